"""A run on Kubernetes: a manifest of the same jobs that SLURM gets, as a JobSet (API
jobset.x-k8s.io/v1alpha2) and a ConfigMap with the recipe. Pure functions; nothing is submitted.

Each command of a job becomes a replicated job, which starts when the one before it is complete:
dependencies on several jobs are newer than the API that clusters have. The tasks of a job array are
its replicas, and the nodes of a training the pods of an indexed job, which torchrun connects.
"""

from __future__ import annotations

import itertools
import re
import shlex
from typing import Any

from pocl_ds.cluster.attempts import USER_ERROR
from pocl_ds.cluster.job_graph import JobCommand, JobSpec
from pocl_ds.cluster.job_options import job_limits, parse_memory
from pocl_ds.cluster.profile import KubernetesConfig, Profile
from pocl_ds.cluster.submit import Submission
from pocl_ds.config.recipe_file import dump_recipe
from pocl_ds.config.yaml_io import dump_yaml
from pocl_ds.errors import RecipeError

RECIPE_FOLDER = "/etc/pocl"
MASTER_PORT = 29500
GPU_RESOURCE = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}
MAX_NAME = 30  # names of pods have the run's, the job's and two indices in 63 characters
JOB_INDEX = "metadata.annotations['jobset.sigs.k8s.io/job-index']"


def manifest(submission: Submission) -> str:
    """The YAML documents that `kubectl apply` takes; empty if every step is finished.

    Raises RecipeError if the profile has no section `kubernetes`, or no claim is mounted where the
    run directory is.
    """
    settings = submission.profile.kubernetes
    if settings is None:
        raise RecipeError(
            f"profile {submission.profile.name} has no section kubernetes: write its image and "
            "claims, as in kubernetes: {image: pocl, claims: {shared: /shared}}"
        )
    if not any(submission.path.is_relative_to(path) for path in settings.claims.values()):
        raise RecipeError(
            f"the run directory {submission.path} is below no mount path of kubernetes.claims "
            f"({', '.join(settings.claims.values())}): name a --run-dir below one"
        )
    if not submission.jobs:
        return ""
    name = resource_name(submission.recipe.name)
    metadata = {"name": name, "namespace": settings.namespace}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"recipe.yaml": dump_recipe(submission.recipe)},
    }
    jobs = [
        replicated_job(submission, settings, name, job, command)
        for job in submission.jobs
        for command in job.commands
    ]
    for earlier, later in itertools.pairwise(jobs):
        later["dependsOn"] = [{"name": earlier["name"], "status": "Complete"}]
    # A step that is finished already ends at once, so a restart of all jobs repeats no work.
    policy = {
        "maxRestarts": submission.profile.attempts,
        "rules": [
            {
                "name": "errorOfTheUser",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {"failurePolicy": policy, "replicatedJobs": jobs},
    }
    return f"{dump_yaml(config_map)}---\n{dump_yaml(job_set)}"


def resource_name(text: str) -> str:
    """A name that Kubernetes accepts: lower-case letters, digits and -, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}"
    return name[:MAX_NAME].strip("-")


def replicated_job(
    submission: Submission,
    settings: KubernetesConfig,
    run_name: str,
    job: JobSpec,
    command: JobCommand,
) -> dict[str, Any]:
    """One command of a job as an entry of `replicatedJobs`, without what it depends on."""
    profile, step = submission.profile, command.arguments[0]
    name = job.name if len(job.commands) == 1 else f"{job.name}-{step}"
    nodes = job.nodes if command.ranks else 1
    script = job_script(submission, settings, f"{run_name}-{name}", run_name, job, command)
    container = {
        "name": "pocl",
        "image": settings.image,
        "command": ["bash", "-c", script],
        "env": [
            *({"name": key, "value": value} for key, value in _variables(profile, job).items()),
            {"name": "JOB_INDEX", "valueFrom": {"fieldRef": {"fieldPath": JOB_INDEX}}},
        ],
        "resources": {"limits": _resources(profile, job)},
        "volumeMounts": [
            {"name": "recipe", "mountPath": RECIPE_FOLDER},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": claim, "mountPath": path} for claim, path in settings.claims.items()),
        ],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": profile.grace_seconds,
        "containers": [container],
        "volumes": [
            {"name": "recipe", "configMap": {"name": run_name}},
            # NCCL and data loaders need more shared memory than the 64 MB of a container.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *(
                {"name": claim, "persistentVolumeClaim": {"claimName": claim}}
                for claim in settings.claims
            ),
        ],
    }
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    on_user_error = {"containerName": "pocl", "operator": "In", "values": [USER_ERROR]}
    spec = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": on_user_error}]},
        "template": {"spec": pod},
    }
    return {"name": name, "replicas": max(len(job.array), 1), "template": {"spec": spec}}


def job_script(
    submission: Submission,
    settings: KubernetesConfig,
    job_name: str,
    subdomain: str,
    job: JobSpec,
    command: JobCommand,
) -> str:
    """The shell script of a pod: the profile's setup, the arguments of this replica, and the
    command, which torchrun starts on all ranks of this node.
    """
    # A failing line of the setup does not end a job, as on SLURM.
    lines = [*submission.profile.setup, "set -euo pipefail"]
    is_last = command is job.commands[-1]
    if job.array and is_last:
        lines += ["case $JOB_INDEX in"]
        lines += [f"  {i}) set -- {shlex.join(words)} ;;" for i, words in enumerate(job.array)]
        lines += ["esac"]
    start = shlex.quote(settings.python)
    if command.ranks:
        master = f"{job_name}-$JOB_INDEX-0.{subdomain}" if job.nodes > 1 else "127.0.0.1"
        start += (
            f" -m torch.distributed.run --nnodes={job.nodes} --nproc-per-node={job.tasks_per_node}"
            f' --node-rank="$JOB_COMPLETION_INDEX" --master-addr="{master}"'
            f" --master-port={MASTER_PORT}"
        )
    words = [*command.arguments, f"{RECIPE_FOLDER}/recipe.yaml", "--run-dir", str(submission.path)]
    lines.append(f'exec {start} -m pocl_ds.cli.main {shlex.join(words)} "$@"')
    return "\n".join(lines) + "\n"


def _variables(profile: Profile, job: JobSpec) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": str(job.cpus_per_task)}
    if not job.gpus_per_node:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables | profile.environment | profile.network.variables


def _resources(profile: Profile, job: JobSpec) -> dict[str, str]:
    """Quantities of a pod, which runs the tasks of one node."""
    limits = job_limits(profile, job)
    resources = {"cpu": str((limits.cpus_per_task or 1) * job.tasks_per_node)}
    if megabytes := parse_memory(limits.memory):
        resources["memory"] = f"{megabytes:.0f}Mi"
    if job.gpus_per_node:
        resources[GPU_RESOURCE[profile.gpu_vendor]] = str(job.gpus_per_node)
    return resources
