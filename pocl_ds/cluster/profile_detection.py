"""A first cluster profile from the output of sinfo and scontrol."""

from __future__ import annotations

import re
from typing import Any

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.profile import Profile, check_profile
from pocl_ds.errors import ResourceError

# Partition, availability, time limit, nodes, cores, memory in MiB, generic resources.
SINFO_FORMAT = "%R|%a|%l|%D|%c|%m|%G"


def detect_profile(partition: str | None = None) -> tuple[Profile, list[str]]:
    """A profile for a partition, and remarks on what was chosen.

    The default partition is the one with the most GPUs, then SLURM's default one. Raises
    ResourceError if no such partition is up.
    """
    # Read the partitions that are up.
    output = scheduler.call("sinfo", "--noheader", f"--format={SINFO_FORMAT}")
    rows = [line.split("|") for line in output.splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[1] == "up"]
    if not rows:
        raise ResourceError("sinfo lists no partition that is up: ask the cluster admins")
    names = sorted({row[0] for row in rows})
    if partition is not None and partition not in names:
        raise ResourceError(f"no partition {partition!r} is up: choose one of {', '.join(names)}")

    # Choose one.
    listing = scheduler.call("sinfo", "--noheader", "--format=%P").replace("\n", " ")
    default = re.search(r"(\S+)\*", listing)
    name, _, time_limit, nodes, cores, _, resources = max(
        (row for row in rows if partition in (None, row[0])),
        key=lambda row: (
            _gpus(row[6])[1],
            default is not None and row[0] == default.group(1),
            int(re.sub(r"\D", "", row[3]) or 0),
        ),
    )

    # Describe it.
    gpu_type, gpus = _gpus(resources)
    config = scheduler.call("scontrol", "show", "config")
    cluster = _config_value(config, "ClusterName") or "cluster"
    tree: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", cluster),
        "partition": name,
        "cpus_per_node": int(re.sub(r"\D", "", cores)),
        "time": "24:00:00" if time_limit == "infinite" else time_limit,
    }
    if gpus:
        tree |= {"gpus_per_node": gpus, "gpu_type": gpu_type, "memory": "0"}
        tree["gres"] = "cons_tres" not in (_config_value(config, "SelectType") or "")
    remarks = [
        f"partition {name} of {', '.join(names)}: {nodes} nodes, {cores} cores, "
        f"{gpus or 'no'} GPUs a node"
    ]
    if _config_value(config, "JobRequeue") == "0":
        remarks.append("the cluster does not requeue jobs by default: the jobs set --requeue")
    if _config_value(config, "AccountingStorageType") == "accounting_storage/none":
        remarks.append("no accounting: `pocl status` reads squeue and the run's own files")
    remarks.append("fill in account, interface and setup (modules) as your cluster requires")
    return check_profile(tree, "detected"), remarks


def _gpus(resources: str) -> tuple[str | None, int]:
    """Type and number of a node's GPUs: gpu:8, gpu:h100:8(S:0-1)."""
    match = re.search(r"gpu:(?:([^:,()]+):)?(\d+)(?=[,(]|$)", resources)
    return (match.group(1), int(match.group(2))) if match else (None, 0)


def _config_value(config: str, name: str) -> str | None:
    match = re.search(rf"^{name}\s*=\s*(\S+)", config, re.MULTILINE)
    return match.group(1) if match else None
