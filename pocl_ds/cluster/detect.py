"""A first profile of the cluster that one stands on, from what sinfo and scontrol say."""

from __future__ import annotations

import re
from typing import Any

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.profile import Profile, check_profile
from pocl_ds.errors import ResourceError

FORMAT = "%R|%a|%l|%D|%c|%m|%G"  # partition, up, time limit, nodes, cores, MiB, generic resources


def detect(partition: str | None = None) -> tuple[Profile, list[str]]:
    """A profile for a partition (default: the one with GPUs, else the default one), and remarks on
    what was chosen.
    """
    rows = [
        line.split("|")
        for line in scheduler.call("sinfo", "--noheader", f"--format={FORMAT}").splitlines()
    ]
    rows = [row for row in rows if len(row) == 7 and row[1] == "up"]
    if not rows:
        raise ResourceError("sinfo names no partition that is up: ask those who run the cluster")
    names = sorted({row[0] for row in rows})
    if partition is not None and partition not in names:
        raise ResourceError(
            f"there is no partition {partition!r} that is up: take one of {', '.join(names)}"
        )
    default = scheduler.call("sinfo", "--noheader", "--format=%P").replace("\n", " ")
    usual = re.search(r"(\S+)\*", default)
    chosen = max(
        (row for row in rows if partition in (None, row[0])),
        key=lambda row: (
            _gpus(row[6])[1],
            usual is not None and row[0] == usual.group(1),
            int(re.sub(r"\D", "", row[3]) or 0),
        ),
    )
    kind, gpus = _gpus(chosen[6])
    config = scheduler.call("scontrol", "show", "config")
    tree: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", _value(config, "ClusterName") or "cluster"),
        "partition": chosen[0],
        "cpus_per_node": int(re.sub(r"\D", "", chosen[4])),
        "time": "24:00:00" if chosen[2] == "infinite" else chosen[2],
    }
    if gpus:
        tree |= {"gpus_per_node": gpus, "gpu_type": kind, "memory": "0"}
        tree["gres"] = "cons_tres" not in (_value(config, "SelectType") or "")
    remarks = [
        f"partition {chosen[0]} of {', '.join(names)}: {chosen[3]} nodes, {chosen[4]} cores, "
        f"{gpus or 'no'} GPUs a node"
    ]
    if _value(config, "JobRequeue") == "0":
        remarks.append("the cluster does not requeue by itself: the jobs ask for it (--requeue)")
    if _value(config, "AccountingStorageType") == "accounting_storage/none":
        remarks.append("no accounting: `pocl status` reads squeue and the run's own files")
    remarks.append("fill in account, interface and setup (modules) as your cluster asks for them")
    return check_profile(tree, "detected"), remarks


def _gpus(resources: str) -> tuple[str | None, int]:
    """Type and number of a node's GPUs: gpu:8, gpu:h100:8(S:0-1)."""
    found = re.search(r"gpu:(?:([^:,()]+):)?(\d+)(?=[,(]|$)", resources)
    return (found.group(1), int(found.group(2))) if found else (None, 0)


def _value(config: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*=\s*(\S+)", config, re.MULTILINE)
    return found.group(1) if found else None
