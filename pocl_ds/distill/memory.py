"""Does a training fit on this machine? A coarse look before anything is loaded, so that no rank dies half-way."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_ds import distributed
from pocl_ds.errors import ResourceError

log = logging.getLogger("pocl_ds")

# float32: weights, gradients, two moments, and ZeRO's flat copy of the weights.
BYTES_PER_TRAINED_PARAMETER = 4 * 5
BYTES_COPIED = 4 * 3  # weights and moments once more, while a checkpoint is written in the background
BYTES_GATHERED = 4 * 2  # a trained parameter whole on a rank during a step, and its gradient before it is scattered
BYTES_OF_WRITER = 2 << 30  # beside its weights: an interpreter, its cache of keys and values
BYTES_PER_RANK = 2 << 30  # interpreter, libraries, gathered layers, activations of a small micro-batch


def check_memory(
    student: str, teachers: Sequence[str], *, teacher_bytes: int, teacher_sharded: bool, chunk_bytes: int, sharded: bool,
    copied: bool, writer: bool = False,
) -> None:  # fmt: skip
    """Raise ResourceError where this node's ranks need more memory than it has free. CPU only; GPUs are left to try.

    student, teachers: folders or Hub names; only their configurations are read. teacher_bytes: a teacher weight's size.
    copied: checkpoints are written in the background. writer: each rank has one of its own, for the student's responses.
    """
    if distributed.device().type != "cpu":
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    copies = ranks / distributed.world_size() if sharded else ranks
    trained = parameters(student)
    student_bytes = trained * (BYTES_PER_TRAINED_PARAMETER + BYTES_COPIED * copied)
    frozen = sum(parameters(teacher) for teacher in teachers) * teacher_bytes
    models = student_bytes * copies + frozen * (ranks / distributed.world_size() if teacher_sharded else ranks)
    gathered = trained * BYTES_GATHERED if sharded else 0  # ZeRO-3 keeps weights from forward to backward where they fit
    of_writer = BYTES_OF_WRITER + trained * 4 if writer else 0
    need = int(models) + ranks * (BYTES_PER_RANK + gathered + chunk_bytes + of_writer)
    free = available_bytes()
    if need > free:
        raise ResourceError(
            f"{ranks} ranks on this machine need about {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
            "take fewer ranks (launch.ranks), a smaller model, or a machine with more memory"
        )


def parameters(model: str) -> int:
    """Number of parameters, from the configuration alone; tied weights count once."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in built.parameters())


def available_bytes() -> int:
    """Memory this process may still take: the machine's, or its control group's where that is smaller."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
