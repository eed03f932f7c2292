"""A first cluster profile from the output of sinfo and scontrol."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.profile import Profile, check_profile, dump_profile
from pocl_ds.errors import ResourceError

# Partition, availability, time limit, nodes, cores, memory in MiB, generic resources.
SINFO_FORMAT = "%R|%a|%l|%D|%c|%m|%G"
AMD_TYPE = re.compile(r"(amd|instinct|mi\d{2,3}|gfx\d)", re.IGNORECASE)
MIG_SLICE = re.compile(r"\dg\.\d+gb")
# Fields that SLURM does not tell, as comments at the end of a detected profile.
SUGGESTED_FIELDS = {
    "account": "account: my-account",
    "network": "network: {interface: ib0}",
    "setup": "setup: [module load cuda]",
    "environment": "environment: {HF_HOME: /shared/huggingface}",
    "mail": "mail: me@example.com",
}


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike. gpu_type: None without GPUs, or if SLURM names none."""

    partition: str
    time_limit: str
    nodes: int
    cores: int
    gpu_type: str | None
    gpus: int

    @property
    def has_slices(self) -> bool:
        """Whether its GPUs are MIG slices."""
        return self.gpu_type is not None and MIG_SLICE.search(self.gpu_type) is not None

    @property
    def is_amd(self) -> bool:
        """Whether the name of its GPUs is one of AMD's, such as mi300x."""
        return self.gpu_type is not None and AMD_TYPE.match(self.gpu_type) is not None

    @property
    def label(self) -> str:
        """Its GPUs and number of nodes in words."""
        gpus = f"{self.gpus} x {self.gpu_type or 'GPU'}" if self.gpus else "no GPU"
        return f"{self.partition}: {self.nodes} nodes of {self.cores} cores and {gpus}"


def detect_profile(
    partition: str | None = None, gpu_type: str | None = None
) -> tuple[Profile, list[str]]:
    """A profile for one kind of nodes, and remarks on what was chosen.

    partition, gpu_type: choose among these nodes. The default is the kind with the most GPUs that
    are not slices, then SLURM's default partition, then the most nodes. Raises ResourceError if
    there are no such nodes.
    """
    kinds = _node_kinds()
    names = sorted({kind.partition for kind in kinds})
    if partition is not None and partition not in names:
        raise ResourceError(f"no partition {partition!r} is up: choose one of {', '.join(names)}")
    matching = [
        kind
        for kind in kinds
        if partition in (None, kind.partition)
        and (gpu_type is None or (kind.gpu_type or "").lower() == gpu_type.lower())
    ]
    if not matching:
        types = ", ".join(sorted({kind.gpu_type for kind in kinds if kind.gpu_type})) or "none"
        raise ResourceError(
            f"no nodes that are up have GPUs of the type {gpu_type!r}: choose one of {types}"
        )
    listing = scheduler.call("sinfo", "--noheader", "--format=%P").replace("\n", " ")
    default = re.search(r"(\S+)\*", listing)
    chosen = max(
        matching,
        key=lambda kind: (
            0 if kind.has_slices else kind.gpus,
            kind.gpus,
            default is not None and kind.partition == default.group(1),
            kind.nodes,
        ),
    )
    config = scheduler.call("scontrol", "show", "config")
    return check_profile(_describe(chosen, config), "detected"), _remarks(chosen, kinds, config)


def commented_profile(profile: Profile) -> str:
    """A profile as YAML, with what each field means, and with fields that SLURM does not tell as
    comments.
    """
    fields = type(profile).model_fields
    lines = []
    for line in dump_profile(profile).splitlines():
        name = line.partition(":")[0]
        description = fields[name].description if name in fields else None
        lines.append(f"{line:<32} # {_first_sentence(description)}" if description else line)
    lines += ["", "# Fill in what your cluster requires:"]
    for name, example in SUGGESTED_FIELDS.items():
        if getattr(profile, name) == fields[name].get_default(call_default_factory=True):
            lines.append(f"{'# ' + example:<50} # {_first_sentence(fields[name].description)}")
    return "\n".join(lines) + "\n"


def _node_kinds() -> list[NodeKind]:
    """The kinds of nodes of the partitions that are up. Raises ResourceError without any."""
    output = scheduler.call("sinfo", "--noheader", f"--format={SINFO_FORMAT}")
    rows = [line.split("|") for line in output.splitlines()]
    kinds = [
        NodeKind(row[0], row[2], _number(row[3]), max(_number(row[4]), 1), *_gpus(row[6]))
        for row in rows
        if len(row) == 7 and row[1] == "up"
    ]
    if not kinds:
        raise ResourceError("sinfo lists no partition that is up: ask the cluster admins")
    return kinds


def _describe(kind: NodeKind, config: str) -> dict[str, Any]:
    """The fields of a profile."""
    cluster = _config_value(config, "ClusterName") or "cluster"
    tree: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", cluster),
        "partition": kind.partition,
        "cpus_per_node": kind.cores,
        "time": "24:00:00" if kind.time_limit == "infinite" else kind.time_limit,
    }
    if kind.gpus:
        tree |= {"gpus_per_node": kind.gpus, "gpu_type": kind.gpu_type, "memory": "0"}
        if kind.is_amd:
            tree["gpu_vendor"] = "amd"
        tree["gres"] = "cons_tres" not in (_config_value(config, "SelectType") or "")
    return tree


def _remarks(chosen: NodeKind, kinds: list[NodeKind], config: str) -> list[str]:
    """What a user should know of the choice and of the cluster."""
    remarks = [chosen.label]
    if other_kinds := [kind.label for kind in kinds if kind != chosen]:
        remarks.append(f"not chosen, see --partition and --gpu: {'; '.join(other_kinds)}")
    if any(kind.partition == chosen.partition and kind != chosen for kind in kinds):
        remarks.append(
            "its nodes differ: the profile is for those above, and constraint or gpu_type keeps "
            "jobs off the others"
        )
    if chosen.has_slices:
        remarks.append("its GPUs are MIG slices, which NCCL does not connect: use one rank")
    if chosen.is_amd:
        remarks.append("its GPUs are AMD's: submit from an environment whose torch is for ROCm")
    if _config_value(config, "JobRequeue") == "0":
        remarks.append("the cluster does not requeue jobs by default: the jobs set --requeue")
    if _config_value(config, "AccountingStorageType") == "accounting_storage/none":
        remarks.append("no accounting: `pocl status` reads squeue and the run's own files")
    return remarks


def _gpus(resources: str) -> tuple[str | None, int]:
    """Type and number of a node's GPUs: gpu:8, gpu:h100:8(S:0-1)."""
    match = re.search(r"gpu:(?:([^:,()]+):)?(\d+)(?=[,(]|$)", resources)
    return (match.group(1), int(match.group(2))) if match else (None, 0)


def _number(text: str) -> int:
    """A number of sinfo, which ends with + where nodes differ."""
    return int(re.sub(r"\D", "", text) or 0)


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=[.;])\s", text or "", maxsplit=1)[0].rstrip(".;")


def _config_value(config: str, name: str) -> str | None:
    match = re.search(rf"^{name}\s*=\s*(\S+)", config, re.MULTILINE)
    return match.group(1) if match else None
