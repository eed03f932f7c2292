"""Manifests for Kubernetes: the jobs of the table, with the fields of the API."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ds.cli.main import main
from pocl_ds.cluster.kubernetes import manifest, resource_name
from pocl_ds.cluster.profile import check_profile
from pocl_ds.cluster.submit import Submission
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.run_dir import RunDirectory

# Fields of the objects that a manifest has, from the references of the APIs v1, batch/v1 and
# jobset.x-k8s.io/v1alpha2. str: free keys and text; a list holds entries of one kind.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [
                {"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}},
            ],
            "resources": {"limits": dict},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "configMap": {"name": str},
            "emptyDir": {"medium": str},
            "persistentVolumeClaim": {"claimName": str},
        }
    ],
}
JOB = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": str,
                "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
            }
        ]
    },
    "template": {"spec": POD},
}
METADATA = {"name": str, "namespace": str}
KINDS: dict[str, Any] = {
    "ConfigMap": {"apiVersion": str, "kind": str, "metadata": METADATA, "data": dict},
    "JobSet": {
        "apiVersion": str,
        "kind": str,
        "metadata": METADATA,
        "spec": {
            "failurePolicy": {
                "maxRestarts": int,
                "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
            },
            "replicatedJobs": [
                {
                    "name": str,
                    "replicas": int,
                    "template": {"spec": JOB},
                    "dependsOn": [{"name": str, "status": str}],
                }
            ],
        },
    },
}


def check_fields(value: Any, allowed: Any, path: str = "") -> None:
    """Fail at the first field that the API does not have, or whose value has another type."""
    if isinstance(allowed, list):
        assert isinstance(value, list) and value, path
        for entry in value:
            check_fields(entry, allowed[0], f"{path}[]")
    elif isinstance(allowed, dict):
        assert isinstance(value, dict) and value.keys() <= allowed.keys(), (path, value)
        for name, entry in value.items():
            check_fields(entry, allowed[name], f"{path}.{name}")
    else:
        assert type(value) is allowed, (path, value)


PROFILE: dict[str, Any] = {
    "name": "cloud",
    "gpus_per_node": 4,
    "cpus_per_node": 32,
    "memory": "100G",
    "setup": ["ulimit -l unlimited"],
    "environment": {"HF_HOME": "/shared/hf"},
    "network": {"interface": "eth0"},
    "kubernetes": {"image": "pocl:1", "claims": {"shared": "/shared"}, "namespace": "team"},
}


def submission(run: str = "/shared/runs/x", **fields: Any) -> Submission:
    sections = fields.pop("sections", {})
    recipe = {
        "name": "Llama_8B.test",
        "teacher": {"model": "org/t"},
        "data": {"source": "documentation"},
        "student": {"model": "org/s"},
        "launch": {"ranks": 8},
        "score": {"shards": 3},
        "train": {"batch_size": 8, "micro_batch_size": 1},
        **sections,
    }
    profile = check_profile({**PROFILE, **fields}, "x")
    return Submission(RunDirectory(run), check_recipe(recipe), profile, nodes=None)


def documents(submitted: Submission) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap, and the replicated jobs by name."""
    config_map, job_set = yaml.safe_load_all(manifest(submitted))
    check_fields(config_map, KINDS["ConfigMap"])
    check_fields(job_set, KINDS["JobSet"])
    jobs = job_set["spec"]["replicatedJobs"]
    assert len({job["name"] for job in jobs}) == len(jobs)
    return config_map, {job["name"]: job for job in jobs}


def pod(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["template"]["spec"]["template"]["spec"]
    return spec


def test_the_jobs_are_those_of_slurm_in_their_order() -> None:
    submitted = submission()
    config_map, jobs = documents(submitted)
    assert config_map["metadata"] == {"name": "llama-8b-test", "namespace": "team"}
    assert check_recipe(yaml.safe_load(config_map["data"]["recipe.yaml"])) == submitted.recipe
    commands = [command for job in submitted.jobs for command in job.commands]
    assert len(jobs) == len(commands)
    for job, command in zip(jobs.values(), commands, strict=True):
        assert (
            f"pocl_ds.cli.main {command.arguments[0]} /etc/pocl/recipe.yaml"
            in (pod(job)["containers"][0]["command"][2])
        )
    # Each waits for the one before it.
    names = list(jobs)
    assert "dependsOn" not in jobs[names[0]]
    for before, name in itertools.pairwise(names):
        assert jobs[name]["dependsOn"] == [{"name": before, "status": "Complete"}]


def test_a_training_spans_its_nodes() -> None:
    _, jobs = documents(submission())
    spec = jobs["train"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], jobs["train"]["replicas"]) == (2, 2, 1)
    container = pod(jobs["train"])["containers"][0]
    limits = {"cpu": "32", "memory": "102400Mi", "nvidia.com/gpu": "4"}
    assert container["resources"]["limits"] == limits
    assert (
        " -m torch.distributed.run --nnodes=2 --nproc-per-node=4 "
        '--node-rank="$JOB_COMPLETION_INDEX" '
        '--master-addr="llama-8b-test-train-$JOB_INDEX-0.llama-8b-test" --master-port=29500 '
        "-m pocl_ds.cli.main train"
    ) in container["command"][2]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["NCCL_SOCKET_IFNAME"] == "eth0" and variables["HF_HOME"] == "/shared/hf"
    assert "DS_ACCELERATOR" not in variables


def test_an_array_becomes_replicas() -> None:
    _, jobs = documents(submission())
    score = jobs["score"]
    assert score["replicas"] == 3 and score["template"]["spec"]["completions"] == 1
    script = pod(score)["containers"][0]["command"][2]
    assert "  2) set -- --shard 2/3 ;;" in script and "torch.distributed" not in script
    # The shell gives each replica its own arguments.
    script = script.replace("exec python3 -m pocl_ds.cli.main", "printf '%s ' ")
    for number in range(3):
        process = subprocess.run(
            ["bash", "-c", script],
            env={**os.environ, "JOB_INDEX": str(number)},
            capture_output=True,
            text=True,
        )
        assert process.stdout.split()[-2:] == ["--shard", f"{number}/3"], process.stderr


def test_nodes_without_gpus_and_with_those_of_amd() -> None:
    cpu = {"gpus_per_node": 0, "ranks_per_node": 8, "memory": None}
    container = pod(documents(submission(**cpu))[1]["train"])["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "32"}
    assert {"name": "DS_ACCELERATOR", "value": "cpu"} in container["env"]
    amd = pod(documents(submission(gpu_vendor="amd"))[1]["train"])["containers"][0]
    assert amd["resources"]["limits"]["amd.com/gpu"] == "4"
    selector = {**PROFILE["kubernetes"], "node_selector": {"gpu": "h100"}}
    assert pod(documents(submission(kubernetes=selector))[1]["train"])["nodeSelector"] == {
        "gpu": "h100"
    }


def test_shellcheck_accepts_the_scripts(tmp_path: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (launch/setup.sh --dev installs it)")
    for name, job in documents(submission("/shared/a b; touch x"))[1].items():
        path = tmp_path / f"{name}.sh"
        path.write_text("#!/bin/bash\n" + pod(job)["containers"][0]["command"][2])
        process = subprocess.run([checker, str(path)], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    ("run", "fields", "message"),
    [
        ("/shared/x", {"kubernetes": None}, "profile cloud has no section kubernetes"),
        ("/home/x", {}, r"/home/x is below no mount path of kubernetes.claims \(/shared\)"),
        ("/shared/x", {"kubernetes": {"image": "a"}}, "kubernetes.claims"),
        ("/shared/x", {"kubernetes": {"image": "a", "claims": {}}}, "claims: it needs at least 1"),
        (
            "/shared/x",
            {"kubernetes": {"image": "a", "claims": {"A_b": "/c"}}},
            "kubernetes.claims.A_b: use at most 63 small letters",
        ),
        (
            "/shared/x",
            {"kubernetes": {"image": "a", "claims": {"a": "c"}}},
            "kubernetes.claims.a='c': write an absolute path",
        ),
        (
            "/shared/x",
            {"kubernetes": {"image": "a", "claims": {"a": "/c", "b": "/c/"}}},
            "two claims are mounted at /c: give each its own path",
        ),
        (
            "/shared/x",
            {"kubernetes": {"image": "", "claims": {"a": "/c"}}},
            "kubernetes.image='': write the name of an image",
        ),
    ],
)
def test_a_profile_that_does_not_suffice_is_one_sentence(
    run: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as exc_info:
        manifest(submission(run, **fields))
    assert "\n" not in str(exc_info.value)


@pytest.mark.parametrize(
    ("text", "name"), [("8B", "run-8b"), ("a" * 50, "a" * 30), ("A.b_C", "a-b-c"), ("..", "run")]
)
def test_names_are_those_that_kubernetes_accepts(text: str, name: str) -> None:
    assert resource_name(text) == name


def test_the_command_prints_a_manifest_and_submits_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "cloud.yaml"
    profile.write_text(yaml.safe_dump({**PROFILE, "gpus_per_node": 0}))
    words = ["submit", "quickstart", "--profile", str(profile), "--run-dir", "/shared/q"]
    assert main([*words, "--target", "kubernetes"]) == 2
    assert "--target kubernetes only prints a manifest: add --dry-run" in capsys.readouterr().err
    assert main([*words, "--target", "kubernetes", "--dry-run"]) == 0
    kinds = [document["kind"] for document in yaml.safe_load_all(capsys.readouterr().out)]
    assert kinds == ["ConfigMap", "JobSet"]
