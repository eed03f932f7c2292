"""What `pocl estimate` predicts for a step that is measured: memory and FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pocl_ds.bench.workloads import Workload, gemm_rate
from pocl_ds.models.cost import activation_bytes, model_shape
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.estimate import step_flops
from pocl_ds.models.memory import TrainingSetup, training_memory
from pocl_ds.models.peak_flops import peak_flops as card_peak_flops
from pocl_ds.runtime import distributed

UTILIZATION = 0.4  # of the peak, as `pocl estimate` assumes


@dataclass(frozen=True)
class StepEstimate:
    """memory: bytes without CUDA's context and libraries, which torch's allocator does not see."""

    memory: float
    flops: float


def estimate_step(work: Workload, teacher_mode: str) -> StepEstimate:
    """The estimate of a step in one micro-batch on one rank. teacher_mode: see `TrainingSetup`."""
    teacher_config, student_config = work.configs
    student = model_shape(student_config)
    teacher = None if teacher_mode == "none" else model_shape(teacher_config)
    dtype = resolve_dtype("auto")
    lengths = [total for _, total in work.lengths]
    setup = TrainingSetup(len(lengths), teacher_mode=teacher_mode, dtype=dtype, teacher_dtype=dtype)

    def activations(sizes: Sequence[int], checkpointing: bool) -> float:
        return activation_bytes(
            student_config,
            sizes,
            dtype=getattr(torch, dtype),
            attention="per_sample",
            checkpointing=checkpointing,
        )

    memory = training_memory(
        student, teacher, setup, 1, lengths, work.loss_tokens, activations, base=0.0
    )
    flops = step_flops(student, teacher, setup, lengths, work.loss_tokens)
    return StepEstimate(sum(memory.values()), flops)


@functools.cache
def peak_flops() -> float:
    """FLOP/s of this machine's peak as its maker states it; where it is not known, those that its
    matrix products reach.
    """
    peak = card_peak_flops(distributed.device_name())
    return peak or gemm_rate(torch.get_num_threads())
