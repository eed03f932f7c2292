"""Does a training fit on this machine? A coarse look before anything is loaded, so that no rank
dies half-way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import LoraConfig, ModelSource
from pocl_ds.config.registry import ALL_LINEAR
from pocl_ds.errors import ResourceError
from pocl_ds.models.load import empty_model, load_model_config
from pocl_ds.models.lora import adapter_parameters, targeted
from pocl_ds.runtime import distributed

log = logging.getLogger("pocl_ds")

# float32: weights, gradients, two moments, and ZeRO's flat copy of the weights.
BYTES_PER_TRAINED_PARAMETER = 4 * 5
BYTES_PER_FROZEN_PARAMETER = 4
BYTES_COPIED = (
    4 * 3
)  # weights and moments once more, while a checkpoint is written in the background
# a parameter whole on a rank during a step; a trained one as often for its gradient before it is
# scattered
BYTES_GATHERED = 4
BYTES_OF_WRITER = 2 << 30  # beside its weights: an interpreter, its cache of keys and values
BYTES_PER_RANK = (
    2 << 30
)  # interpreter, libraries, gathered layers, activations of a small micro-batch


def check_memory(
    student: ModelSource,
    teachers: Sequence[tuple[ModelSource, float | None]],
    *,
    teacher_bytes: int,
    teacher_sharded: bool,
    chunk_bytes: int,
    sharded: bool,
    copied: bool,
    writer: bool = False,
    held: bool = False,
    lora: LoraConfig | None = None,
) -> None:
    """Raise ResourceError where this node's ranks need more memory than it has free. CPU only; GPUs
    are left to try.

    student, teachers: where they lie; only their configurations are read. teacher_bytes: a teacher
    weight's size; beside a teacher, that of its linear modules' weights where they are quantised.
    copied: checkpoints are written in the background. writer: each rank has one of its own, for the
    student's responses; held: one rank keeps what its writer has, for checkpoints. lora: adapters
    that are trained alone, beside the student's own weights.
    """
    if distributed.device().type != "cpu":
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    copies = ranks / distributed.world_size() if sharded else ranks
    whole = parameters(student)
    trained, still = (adapters(student, lora), whole) if lora else (whole, 0)
    student_bytes = (
        trained * (BYTES_PER_TRAINED_PARAMETER + BYTES_COPIED * copied)
        + still * BYTES_PER_FROZEN_PARAMETER
    )
    frozen = sum(
        parameters(one) * teacher_bytes - _spared(one, teacher_bytes, quantised)
        for one, quantised in teachers
    )
    models = student_bytes * copies + frozen * (
        ranks / distributed.world_size() if teacher_sharded else ranks
    )
    # ZeRO-3 keeps weights from forward to backward where they fit.
    gathered = (still + 2 * trained) * BYTES_GATHERED if sharded else 0
    of_writer = BYTES_OF_WRITER + whole * 4 if writer else 0
    of_writer_held = whole * 4 if held else 0
    written = (
        still * BYTES_PER_FROZEN_PARAMETER
    )  # whole once more on the rank that writes them: else a step takes more than that
    need = (
        int(models)
        + written
        + of_writer_held
        + ranks * (BYTES_PER_RANK + gathered + chunk_bytes + of_writer)
    )
    free = available_bytes()
    if need > free:
        raise ResourceError(
            f"{ranks} ranks on this machine need about {need / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: "
            "take fewer ranks (launch.ranks), a smaller model, or a machine with more memory"
        )


def _spared(teacher: ModelSource, size: int, quantised: float | None) -> int:
    """Bytes that quantised linear modules are smaller."""
    return 0 if quantised is None else int(linear_parameters(teacher) * (size - quantised))


def parameters(model: ModelSource) -> int:
    """Number of parameters, from the configuration alone; tied weights count once."""
    return sum(p.numel() for p in _empty(model).parameters())


def adapters(model: ModelSource, lora: LoraConfig) -> int:
    """Number of its adapters' parameters. Raises RecipeError where it cannot have these."""
    return adapter_parameters(_empty(model), lora)


def linear_parameters(model: ModelSource) -> int:
    """Number of weights of its linear modules without the head's: what is quantised of a teacher."""
    return sum(module.weight.numel() for module in targeted(_empty(model), (ALL_LINEAR,)).values())


def _empty(model: ModelSource) -> Any:
    config = load_model_config(
        model.model, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    return empty_model(config, trust_remote_code=model.trust_remote_code)


def available_bytes() -> int:
    """Memory this process may still take: the machine's, or its control group's where that is
    smaller.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
