"""The time of a run before it starts: FLOPs, traffic and seconds of its steps, as plain numbers.

A time is arithmetic at a given fraction of the device's peak, or traffic over the links if that
takes longer. Generation is bound by reading weights and the cache of keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config.registry import RECORD_MODES
from pocl_ds.models.cost import ModelShape, kv_cache_bytes, parameter_bytes
from pocl_ds.models.memory import LIVE_PARAMETERS, TrainingSetup
from pocl_ds.models.peak_flops import PEAK_FLOPS, peak_flops

RESCORING = "rescoring"  # the name of its StepTime; it is a part of the step train


@dataclass(frozen=True)
class Device:
    """The device of a rank. Peaks as the maker states them, without sparsity."""

    name: str
    memory: float  # bytes
    flops: float  # per second in bfloat16
    bandwidth: float  # bytes per second of its memory
    link: float  # bytes per second to its neighbors in the node, one way
    base: float  # bytes of context, libraries and communication buffers


GPUS = {
    gpu.name: gpu
    for gpu in (
        Device("h200-141g", 141e9, PEAK_FLOPS["H200"], 4.8e12, 450e9, 2.5e9),
        Device("h100-80g", 80e9, PEAK_FLOPS["H100"], 3.35e12, 450e9, 2.5e9),
        Device("a100-80g", 80e9, PEAK_FLOPS["A100"], 2.0e12, 300e9, 2.0e9),
        Device("a100-40g", 40e9, PEAK_FLOPS["A100"], 1.55e12, 300e9, 2.0e9),
        Device("l40s-48g", 48e9, PEAK_FLOPS["L40S"], 0.86e12, 32e9, 2.0e9),
        Device("a6000-48g", 48e9, PEAK_FLOPS["RTX A6000"], 0.77e12, 32e9, 2.0e9),
        Device("rtx4090-24g", 24e9, PEAK_FLOPS["RTX 4090"], 1.0e12, 25e9, 2.0e9),
    )
}


def find_gpu(name: str) -> Device | None:
    """The GPU that a driver or SLURM calls by this name, such as `NVIDIA A100-SXM4-80GB` or `h100`.

    None if it is not in GPUS, if its memory leaves a choice (`a100`), and for a part of a card.
    """
    text = name.lower()
    if "mig" in text or re.search(r"\dg\.\d", text):
        return None
    matching = []
    for gpu in GPUS.values():
        series, _, memory = gpu.name.partition("-")
        pattern = rf"(?<![a-z0-9]){series.replace('rtx', 'rtx[ _-]?')}(?![a-z0-9])"
        # A variant such as `H100 PCIe` has another peak.
        if re.search(pattern, text) and peak_flops(name) in (None, gpu.flops):
            matching.append((gpu, re.search(rf"(?<![0-9]){memory}", text)))
    if len(matching) > 1:
        matching = [(gpu, has_memory) for gpu, has_memory in matching if has_memory]
    return matching[0][0] if len(matching) == 1 else None


@dataclass(frozen=True)
class ClusterLayout:
    """Nodes, ranks of a node, and the network of a node in bytes per second."""

    nodes: int
    ranks_per_node: int
    network: float = 50e9

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node

    def link(self, device: Device) -> float:
        """Bytes per second that a rank receives in a collective over all ranks."""
        if self.nodes == 1:
            return device.link
        return min(device.link, self.network / self.ranks_per_node)


@dataclass(frozen=True)
class TrainingWork:
    """The data of a training and the number of its optimizer steps."""

    samples: int
    prompt_tokens: float  # mean
    response_tokens: float  # mean, EOS included
    max_length: int
    batch_size: int
    steps: int  # of the whole plan
    scores_samples: bool = True  # whether the step `score` runs
    rescored_samples: int = 0  # by the current student, over all stages that it ranks
    rescoring_runs_teacher: bool = False

    @property
    def tokens(self) -> float:
        """Mean tokens of a sample."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class GenerationWork:
    """Responses that a model generates."""

    responses: int
    prompt_tokens: float  # mean
    max_new_tokens: int  # of each response
    sequences: int  # at the same time


@dataclass(frozen=True)
class StepTime:
    """The estimated time of a workflow step, or of the rescoring between stages of training."""

    name: str
    seconds: float
    flops: float
    bound_by: str


def step_flops(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    lengths: Sequence[int],
    loss_tokens: int,
) -> float:
    """FLOPs of an optimizer step over samples of these lengths. loss_tokens: of all of them."""
    samples = _as_samples(lengths, loss_tokens)
    return float(sample_flops(student, teacher, setup, *samples).sum())


def sample_flops(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    lengths: NDArray[Any],
    loss_tokens: NDArray[Any],
) -> NDArray[np.float64]:
    """FLOPs of each sample in an optimizer step, [samples].

    Backward takes twice as many as forward; activation checkpointing repeats the forward of the
    body. Frozen weights pass a gradient on and have none themselves.

    lengths, loss_tokens: tokens of each sample, [samples].
    """
    passes = 4 if setup.checkpointing else 3
    head = 2.0 * student.head_parameters * np.asarray(loss_tokens, np.float64)
    total = passes * student.sample_flops(lengths, np.zeros(len(lengths))) + 3 * head
    if student.adapters:
        total += 2.0 * lengths * (passes * student.adapters - student.matrix_parameters) - head
    return total + _teacher_sample_flops(teacher, setup, lengths, loss_tokens)


def scoring_flops(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    lengths: Sequence[int],
    loss_tokens: int,
) -> float:
    """FLOPs of the forward passes that score samples of these lengths. teacher: None if it does not
    run.
    """
    total = student.forward_flops(lengths, loss_tokens) + 2.0 * student.adapters * sum(lengths)
    return total + _teacher_flops(teacher, setup, lengths, loss_tokens)


def _teacher_flops(
    teacher: ModelShape | None, setup: TrainingSetup, lengths: Sequence[int], loss_tokens: int
) -> float:
    """FLOPs of the teacher over samples of these lengths. loss_tokens: of all of them."""
    return float(_teacher_sample_flops(teacher, setup, *_as_samples(lengths, loss_tokens)).sum())


def _as_samples(
    lengths: Sequence[int], loss_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lengths, and loss tokens spread over the samples: FLOPs are linear in them."""
    return np.array(lengths, np.float64), np.full(len(lengths), loss_tokens / len(lengths))


def _teacher_sample_flops(
    teacher: ModelShape | None,
    setup: TrainingSetup,
    lengths: NDArray[Any],
    loss_tokens: NDArray[Any],
) -> NDArray[np.float64]:
    """FLOPs of each sample in the teacher's forward pass, or in its head alone over cached hidden
    states.
    """
    if teacher is not None and setup.teacher_mode == "online":
        return teacher.sample_flops(lengths, loss_tokens)
    if teacher is not None and setup.teacher_mode == "cached_hidden_states":
        return 2.0 * teacher.head_parameters * np.asarray(loss_tokens, np.float64)
    return np.zeros(len(lengths))


def micro_step_traffic(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    ranks: int,
    *,
    backward: bool = True,
) -> float:
    """Bytes that each rank receives in a micro-step: gathered weights, scattered gradients.

    backward: false for forward passes alone.
    """
    if not setup.sharded or ranks == 1:
        return 0.0
    # ZeRO-3 gathers the weights of a small model once for forward and backward, else twice.
    gathers = 2 if backward and student.parameters > LIVE_PARAMETERS else 1
    gradients = student.trainable_parameters if backward else 0
    traffic = parameter_bytes(gathers * float(student.parameters) + gradients, setup.dtype)
    shares_ranks = setup.teacher_mode == "online" and not setup.own_teacher_ranks
    if teacher is not None and shares_ranks and setup.teacher_sharded:
        traffic += parameter_bytes(float(teacher.parameters), setup.teacher_dtype)
    return traffic * (ranks - 1) / ranks


def step_times(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    work: TrainingWork,
    layout: ClusterLayout,
    device: Device,
    *,
    utilization: float,
    max_new_tokens: int,
    sequences: int,
    cached_shares: Sequence[tuple[ModelShape, float]] = (),
) -> list[StepTime]:
    """Times of the steps score, cache-teacher and train, and apart from train that of its
    rescoring; the other steps are not estimated.

    utilization: fraction of the device's peak. sequences: concurrent in generation. cached_shares:
    each teacher and the fraction of the samples that it caches; by default `teacher` and all.
    """
    flops_per_second = device.flops * (1 if setup.dtype != "float32" else 0.5) * utilization
    times = []
    if work.scores_samples:
        scoring = GenerationWork(work.samples, work.prompt_tokens, max_new_tokens, sequences)
        times.append(generation_time("score", student, scoring, layout, device, flops_per_second))
    if teacher is not None and setup.teacher_mode in ("cached_hidden_states", *RECORD_MODES):
        length, loss_tokens = max(1, round(work.tokens)), round(work.response_tokens)
        flops = work.samples * sum(
            share * shape.forward_flops([length], loss_tokens)
            for shape, share in cached_shares or [(teacher, 1.0)]
        )
        seconds = flops / flops_per_second / layout.ranks
        times.append(StepTime("cache-teacher", seconds, flops, "arithmetic"))
    times.append(_training_time(student, teacher, setup, work, layout, device, flops_per_second))
    if work.rescored_samples:
        scorer = teacher if work.rescoring_runs_teacher else None
        times.append(
            _rescoring_time(student, scorer, setup, work, layout, device, flops_per_second)
        )
    return times


def _training_time(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    work: TrainingWork,
    layout: ClusterLayout,
    device: Device,
    flops_per_second: float,
) -> StepTime:
    """An optimizer step takes as long as its arithmetic or its traffic, whichever is longer."""
    lengths = [max(1, round(work.tokens))] * work.batch_size
    loss_tokens = round(work.response_tokens * work.batch_size)
    flops = step_flops(student, teacher, setup, lengths, loss_tokens)
    teacher_flops = _teacher_flops(teacher, setup, lengths, loss_tokens)
    ranks = layout.ranks - setup.own_teacher_ranks
    arithmetic_seconds = _arithmetic_seconds(flops, teacher_flops, setup, ranks, flops_per_second)
    groups = ranks // setup.sequence_parallel_size
    micro_steps = max(1, work.batch_size // (setup.micro_batch_size * groups))
    bytes_received = micro_steps * micro_step_traffic(student, teacher, setup, ranks)
    network_seconds = bytes_received / layout.link(device)
    bound_by = "arithmetic" if arithmetic_seconds >= network_seconds else "the network"
    return StepTime(
        "train", work.steps * max(arithmetic_seconds, network_seconds), work.steps * flops, bound_by
    )


def _arithmetic_seconds(
    flops: float, teacher_flops: float, setup: TrainingSetup, ranks: int, flops_per_second: float
) -> float:
    """Seconds of `flops`, of which a teacher on its own ranks computes its part meanwhile.

    ranks: of the student.
    """
    if not setup.own_teacher_ranks:
        return flops / flops_per_second / ranks
    student_seconds = (flops - teacher_flops) / ranks
    return max(student_seconds, teacher_flops / setup.own_teacher_ranks) / flops_per_second


def _rescoring_time(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    work: TrainingWork,
    layout: ClusterLayout,
    device: Device,
    flops_per_second: float,
) -> StepTime:
    """Forward passes over the samples that are scored again, in micro-batches as large as those of
    training. teacher: None if it does not run.
    """
    length, loss_tokens = max(1, round(work.tokens)), round(work.response_tokens)
    flops = work.rescored_samples * scoring_flops(student, teacher, setup, [length], loss_tokens)
    teacher_flops = work.rescored_samples * _teacher_flops(teacher, setup, [length], loss_tokens)
    ranks = layout.ranks - setup.own_teacher_ranks
    arithmetic_seconds = _arithmetic_seconds(flops, teacher_flops, setup, ranks, flops_per_second)
    groups = ranks // setup.sequence_parallel_size
    micro_steps = -(-work.rescored_samples // (setup.micro_batch_size * groups))
    traffic = micro_step_traffic(student, teacher, setup, ranks, backward=False)
    network_seconds = micro_steps * traffic / layout.link(device)
    bound_by = "arithmetic" if arithmetic_seconds >= network_seconds else "the network"
    return StepTime(RESCORING, max(arithmetic_seconds, network_seconds), flops, bound_by)


def generation_time(
    name: str,
    model: ModelShape,
    work: GenerationWork,
    layout: ClusterLayout,
    device: Device,
    flops_per_second: float,
) -> StepTime:
    """Each generated token reads the weights once for all sequences in flight, and their caches."""
    new_tokens = work.responses * work.max_new_tokens
    prompt_length = max(1, round(work.prompt_tokens))
    flops = work.responses * model.forward_flops([prompt_length], 0)
    flops += new_tokens * 2.0 * (model.matrix_parameters + model.head_parameters)

    weights = parameter_bytes(model.parameters, "bfloat16")
    mean_length = round(work.prompt_tokens + work.max_new_tokens / 2)
    caches = kv_cache_bytes(model, mean_length, "bfloat16") * work.sequences
    reading_seconds = new_tokens / work.sequences * (weights + caches) / device.bandwidth

    arithmetic_seconds = flops / flops_per_second
    bound_by = (
        "arithmetic" if arithmetic_seconds >= reading_seconds else "reading weights and caches"
    )
    return StepTime(name, max(arithmetic_seconds, reading_seconds) / layout.ranks, flops, bound_by)
