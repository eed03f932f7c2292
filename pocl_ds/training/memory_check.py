"""A coarse check, before anything is loaded, that a training fits into this machine's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.config import LoraConfig, ModelSource
from pocl_ds.config.registry import ALL_LINEAR
from pocl_ds.errors import ResourceError
from pocl_ds.models.cost import parameter_bytes
from pocl_ds.models.load import empty_model, load_model_config
from pocl_ds.models.lora import adapter_parameters, target_linear_modules
from pocl_ds.models.memory import frozen_weight_bytes, student_state_bytes
from pocl_ds.runtime import distributed
from pocl_ds.runtime.formatting import format_size
from pocl_ds.runtime.job_roles import job_roles

STUDENT_DTYPE = "float32"  # the only one on CPUs
# Beside its weights, a rollout worker needs an interpreter and its cache of keys and values.
ROLLOUT_WORKER_BYTES = 2 << 30
# Interpreter, libraries, gathered layers, activations of a small micro-batch.
RANK_BYTES = 2 << 30


@dataclass(frozen=True)
class MemoryDemand:
    """The models and buffers of a training that take memory. Models are described by their
    configurations alone.
    """

    student: ModelSource
    # Each teacher, and the bytes per weight of its linear layers if it is quantized.
    teachers: Sequence[tuple[ModelSource, float | None]]
    teacher_dtype: str
    teacher_sharded: bool
    student_sharded: bool
    chunk_bytes: int  # of logits and their buffers
    async_save: bool
    one_teacher_at_a_time: bool = False  # only the teacher of the current stage is in memory
    rollout_worker: bool = False  # every rank has one, with a copy of the student
    saved_rollout_weights: bool = False  # one rank holds the worker's weights for checkpoints
    lora: LoraConfig | None = None

    def bytes_on_node(
        self, ranks: int, total_ranks: int, teacher_ranks: int = 0, total_teacher_ranks: int = 0
    ) -> float:
        """Bytes that `ranks` ranks on one machine need, of `total_ranks` in the training, and the
        teacher's own ranks if it has any.
        """
        # Weights, gradients and optimizer of the student; a copy of what a background save writes.
        parameters = count_parameters(self.student)
        trained = count_adapter_parameters(self.student, self.lora) if self.lora else parameters
        frozen = parameters if self.lora else 0
        state = student_state_bytes(frozen + trained, trained, STUDENT_DTYPE, sharded=True)
        copied = 3 * parameter_bytes(trained, STUDENT_DTYPE) if self.async_save else 0
        copies = ranks / total_ranks if self.student_sharded else ranks
        student = (state.total + copied) * copies

        # Weights of the teachers.
        holders, all_holders = ranks, total_ranks
        if total_teacher_ranks:
            holders, all_holders = teacher_ranks, total_teacher_ranks
        teacher_copies = holders / all_holders if self.teacher_sharded else holders
        sizes = [self._teacher_bytes(teacher, quantized) for teacher, quantized in self.teachers]
        teachers = teacher_copies * (
            max(sizes, default=0.0) if self.one_teacher_at_a_time else sum(sizes)
        )

        # On every rank: gathered weights, and gradients before they are scattered (ZeRO-3 keeps
        # weights from forward to backward if they fit), logits, the rollout worker.
        gathered = parameter_bytes(frozen + 2 * trained, STUDENT_DTYPE)
        per_rank = RANK_BYTES + self.chunk_bytes + (gathered if self.student_sharded else 0)
        if self.rollout_worker:
            per_rank += ROLLOUT_WORKER_BYTES + parameter_bytes(parameters, STUDENT_DTYPE)

        # On one rank: the full frozen weights while it writes the final model (a trained model
        # needs more in a step), and the worker's weights for checkpoints.
        single = parameter_bytes(frozen, STUDENT_DTYPE)
        if self.saved_rollout_weights:
            single += parameter_bytes(parameters, STUDENT_DTYPE)
        return student + teachers + ranks * per_rank + teacher_ranks * RANK_BYTES + single

    def _teacher_bytes(self, teacher: ModelSource, quantized: float | None) -> float:
        return frozen_weight_bytes(
            count_parameters(teacher),
            self.teacher_dtype,
            linear_parameters=0 if quantized is None else count_linear_parameters(teacher),
            bytes_per_linear_weight=quantized,
        )


def check_memory(demand: MemoryDemand) -> None:
    """Raise ResourceError if this machine's ranks need more memory than is free. Only CPUs are
    checked; on a GPU a lack of memory shows in the first step.
    """
    if distributed.device().type != "cpu":
        return
    ranks, teacher_ranks, total_teacher_ranks = distributed.ranks_per_node() or 1, 0, 0
    if roles := job_roles():
        ranks, teacher_ranks = roles.on_this_node()
        total_teacher_ranks = roles.teacher_ranks
    need = demand.bytes_on_node(ranks, distributed.world_size(), teacher_ranks, total_teacher_ranks)
    free = available_bytes()
    if need > free:
        raise ResourceError(
            f"{ranks + teacher_ranks} ranks on this machine need about {format_size(need)} of "
            f"memory, and {format_size(free)} are free: use fewer ranks (launch.ranks), a smaller "
            f"model, or a "
            f"machine with more memory"
        )


def count_parameters(model: ModelSource) -> int:
    """Parameters of a model, from its configuration alone; tied weights count once."""
    return sum(p.numel() for p in _empty_model(model).parameters())


def count_adapter_parameters(model: ModelSource, lora: LoraConfig) -> int:
    """Parameters of a model's LoRA adapters. Raises RecipeError if it cannot have these."""
    return adapter_parameters(_empty_model(model), lora)


def count_linear_parameters(model: ModelSource) -> int:
    """Weights of a model's linear layers without the head: those that quantization applies to."""
    modules = target_linear_modules(_empty_model(model), (ALL_LINEAR,))
    return sum(module.weight.numel() for module in modules.values())


def _empty_model(model: ModelSource) -> Any:
    config = load_model_config(
        model.model, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    return empty_model(config, trust_remote_code=model.trust_remote_code)


def available_bytes() -> int:
    """Memory that this process can still allocate: that of the machine, or of its control group if
    that is less.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
