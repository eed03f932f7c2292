"""The options of sbatch that a job gets from its shape and the profile, and SLURM's sizes."""

from __future__ import annotations

import math
import re

from pocl_ds.cluster.job_graph import JobSpec
from pocl_ds.cluster.profile import JobLimits, JobOptions, Profile

UNLIMITED = float("inf")
MEMORY_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}  # in MB, as SLURM counts


def job_limits(profile: Profile, job: JobSpec) -> JobLimits:
    """The options of one job: its own, else the profile's."""
    own = profile.jobs.get(job.name, JobLimits())
    values = {name: getattr(profile, name) for name in (*JobOptions.model_fields, "time")}
    values |= {"memory": _memory(profile, job), "cpus_per_task": job.cpus_per_task}
    values |= {name: value for name, value in own.model_dump().items() if value is not None}
    values["options"] = (*profile.options, *own.options)
    return JobLimits(**values)


def _memory(profile: Profile, job: JobSpec) -> str | None:
    """The memory of a job: on whole nodes that of the profile, else the share of it that the job's
    cores are of a node's; None leaves it to SLURM.
    """
    total = parse_memory(profile.memory)
    if job.whole_nodes or not total:
        return profile.memory if job.whole_nodes else None
    cores = job.cpus_per_task * job.tasks_per_node
    return f"{math.ceil(total * min(cores / profile.cpus_per_node, 1))}M"


def sbatch_options(
    profile: Profile, job: JobSpec, *, run_name: str, log: str, directory: str, is_last: bool
) -> list[str]:
    """The options of a job's #SBATCH lines: numbers, checked words, and quoted paths.

    log, directory: paths without a quotation mark. is_last: whether the run ends with the job.
    """
    limits = job_limits(profile, job)
    throttle = f"%{profile.array_tasks}" if profile.array_tasks else ""
    options = {
        "job-name": f"{run_name}:{job.name}",
        "output": f'"{log}"',
        "open-mode": "append",
        **{name: getattr(limits, name) for name in JobOptions.model_fields},
        "time": limits.time,
        "mem": limits.memory,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": limits.cpus_per_task,
        "signal": f"B:USR2@{profile.grace_seconds}",
        "chdir": f'"{directory}"',
        "array": f"0-{len(job.array) - 1}{throttle}" if job.array else None,
    }
    if job.gpus_per_node:
        gpu_type = f"{profile.gpu_type}:" if profile.gpu_type else ""
        if profile.gres:
            options["gres"] = f"gpu:{gpu_type}{job.gpus_per_node}"
        else:
            options["gpus-per-node"] = f"{gpu_type}{job.gpus_per_node}"
    if profile.mail:
        options["mail-user"] = profile.mail
        options["mail-type"] = "END,FAIL" if is_last else "FAIL"
    if not job.after:
        options["begin"], options["dependency"] = profile.begin, profile.dependency
    return [
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        "--requeue",
        *limits.options,
    ]


def parse_time(text: str | None) -> float:
    """Minutes of a time limit in one of SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    if text is None:
        return 0
    if text in ("UNLIMITED", "INFINITE", "NONE"):
        return UNLIMITED
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60


def parse_memory(text: str | None) -> float:
    """MB of a memory size of sbatch: a number of MB, or with K, M, G or T. 0 is all of a node."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])?B?", text or "0", re.IGNORECASE)
    return float(match[1]) * MEMORY_UNITS[(match[2] or "M").upper()] if match else 0
