"""The memory of a training step, from the configurations of the models.

Memory is itemized at the peak of an optimizer step. What ZeRO-3 holds follows from the shipped
ds_configs: partitioned weights, gradients and Adam states, two gathered blocks (all weights, if
they are fewer than `stage3_max_live_parameters`), and one reduce bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from pocl_ds.config.registry import RECORD_MODES
from pocl_ds.models.cost import ModelShape, max_gathered_parameters, parameter_bytes

LIVE_PARAMETERS = 1e9  # ds_configs: stage3_max_live_parameters
BUCKET = 5e7  # ds_configs: elements that are reduced, or prefetched, together
MAX_MEMORY_FRACTION = 0.92  # of a device's memory that a setup may use
GB = 1e9
GLOO_BYTES = 200e6  # gloo's own buffers, between CPUs

# (lengths of a micro-batch, activation checkpointing) -> bytes kept for backward
Activations: TypeAlias = Callable[[Sequence[int], bool], float]


@dataclass(frozen=True)
class TrainingSetup:
    """The choices of a recipe that decide its memory."""

    micro_batch_size: int
    checkpointing: bool = False  # of activations
    offload_student: bool = False
    offload_teacher: bool = False
    # online, cached_hidden_states, one of RECORD_MODES, or none for SFT
    teacher_mode: str = "online"
    dtype: str = "bfloat16"
    teacher_dtype: str = "bfloat16"
    sharded: bool = True  # by ZeRO-3; else complete on each rank, in plain PyTorch
    teacher_sharded: bool = True
    teacher_bytes_per_weight: float | None = None  # of linear modules, if they are quantized
    chunk_bytes: int = 512 << 20  # of logits and their buffers
    hidden_dtype: str = "model"  # of cached hidden states, see `TeacherCacheConfig`
    record_bytes: int = 0  # of a loss token in the teacher cache, with RECORD_MODES
    teacher_ranks: int = 0  # that run an online teacher alone
    sequence_parallel_size: int = 1  # ranks that share a micro-batch
    offload_activations: bool = False  # those that checkpointing keeps, to the host's memory

    @property
    def own_teacher_ranks(self) -> int:
        """Ranks that run the teacher alone in this mode."""
        return self.teacher_ranks if self.teacher_mode == "online" else 0

    def teacher_weights(self, teacher: ModelShape) -> float:
        """Bytes of all weights of the teacher."""
        return frozen_weight_bytes(
            teacher.parameters,
            self.teacher_dtype,
            linear_parameters=teacher.matrix_parameters,
            bytes_per_linear_weight=self.teacher_bytes_per_weight,
        )

    def cached_bytes_per_token(self, teacher: ModelShape) -> float:
        """Bytes of one loss token in the teacher cache."""
        if self.teacher_mode in RECORD_MODES:
            return self.record_bytes
        if self.hidden_dtype == "int8":
            return teacher.width + 4  # and a scale
        dtype = self.teacher_dtype if self.hidden_dtype == "model" else self.hidden_dtype
        return parameter_bytes(teacher.width, dtype)


@dataclass(frozen=True)
class StudentState:
    """Bytes of a student's weights, gradients and optimizer, without activations."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Bytes of all three."""
        return self.weights + self.gradients + self.optimizer


def student_state_bytes(
    parameters: float, trainable: float, dtype: str, *, sharded: bool
) -> StudentState:
    """Bytes of the state of a student with `parameters`, of which `trainable` have gradients.

    Gradients are summed over micro-batches in float32. The optimizer holds two moments, and a
    float32 copy of the weights: in mixed precision, and under ZeRO-3 also in float32 (flat copy).
    """
    copies = 3 if dtype != "float32" or sharded else 2
    return StudentState(
        parameter_bytes(parameters, dtype), 4.0 * trainable, 4.0 * copies * trainable
    )


def frozen_weight_bytes(
    parameters: float,
    dtype: str,
    *,
    linear_parameters: float = 0,
    bytes_per_linear_weight: float | None = None,
) -> float:
    """Bytes of the weights of a model that only runs forward; its linear maps may be quantized."""
    if bytes_per_linear_weight is None:
        return parameter_bytes(parameters, dtype)
    other_bytes = parameter_bytes(parameters - linear_parameters, dtype)
    return other_bytes + linear_parameters * bytes_per_linear_weight


def training_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    ranks: int,
    lengths: Sequence[int],
    loss_tokens: int,
    activations: Activations,
    base: float,
    *,
    gloo: bool = False,
) -> dict[str, float]:
    """Bytes of one rank at the peak of an optimizer step, itemized by name.

    Args:
        lengths: tokens of each sample of a micro-batch, which `setup.sequence_parallel_size` ranks
            share.
        loss_tokens: loss tokens of that micro-batch.
        activations: bytes that the student's forward keeps, see `cost.activation_bytes`.
        base: bytes of context, libraries and communication buffers.
        gloo: ranks are CPUs, where gathered weights need two more copies (`pocl bench estimate`).
    """
    shards = setup.sequence_parallel_size
    if shards > 1:
        lengths, loss_tokens = [-(-sum(lengths) // shards)], -(-loss_tokens // shards)
    memory = {"libraries and buffers": base}
    memory |= _student_memory(student, setup, ranks, lengths, activations)
    memory |= _head_memory(student, setup, loss_tokens)
    if setup.sharded and not setup.offload_student:
        # During the update ZeRO-3 holds the gradients once more, as one flat tensor.
        memory["student: gradient of the update"] = 4.0 * student.trainable_parameters / ranks
    if teacher is not None:
        memory |= _teacher_memory(teacher, setup, ranks, lengths)
    if gloo and ranks > 1 and setup.sharded:
        memory["gloo buffers"] = GLOO_BYTES + 2 * memory["student: gathered"]
    return memory


def _student_memory(
    student: ModelShape,
    setup: TrainingSetup,
    ranks: int,
    lengths: Sequence[int],
    activations: Activations,
) -> dict[str, float]:
    shards = ranks if setup.sharded else 1
    state = student_state_bytes(
        (student.parameters + student.adapters) / shards,
        student.trainable_parameters / shards,
        setup.dtype,
        sharded=setup.sharded,
    )
    memory = {
        "student: weights": 0.0 if setup.offload_student else state.weights,
        "student: gradients": state.gradients,
        "student: optimizer": 0.0 if setup.offload_student else state.optimizer,
    }
    if setup.sharded:
        bucket = parameter_bytes(min(BUCKET, student.trainable_parameters), setup.dtype)
        memory["student: gathered"] = parameter_bytes(_live_parameters(student), setup.dtype)
        memory["student: bucket"] = 2 * bucket
    kept_on_host = setup.checkpointing and setup.offload_activations
    memory["student: activations"] = (
        parameter_bytes(sum(lengths) * student.width, setup.dtype)  # the last hidden states
        if kept_on_host
        else activations(lengths, setup.checkpointing)
    )
    if setup.checkpointing:  # one block is computed again
        memory["student: activations"] += activations(lengths, False) / student.layers
    return memory


def _head_memory(student: ModelShape, setup: TrainingSetup, loss_tokens: int) -> dict[str, float]:
    # Logits of student and teacher.
    logits = 2.0 * loss_tokens * parameter_bytes(student.rows, setup.dtype)
    memory = {"logits": min(float(setup.chunk_bytes), logits)}
    if not student.adapters:
        # The head's gradient in float32, then also in its own dtype.
        factor = 4.0 if setup.dtype == "float32" else 6.0
        memory["head's gradient"] = factor * student.head_parameters
        memory["embeddings' gradient"] = parameter_bytes(student.head_parameters, setup.dtype)
    return memory


def _teacher_memory(
    teacher: ModelShape, setup: TrainingSetup, ranks: int, lengths: Sequence[int]
) -> dict[str, float]:
    dtype = setup.teacher_dtype
    if setup.teacher_mode == "cached_hidden_states" or setup.own_teacher_ranks:
        return {"teacher: head": parameter_bytes(teacher.head_parameters, dtype)}
    if setup.teacher_mode != "online":
        return {}
    return _forward_memory(teacher, setup, ranks, lengths)


def teacher_rank_memory(
    teacher: ModelShape, setup: TrainingSetup, lengths: Sequence[int], base: float
) -> dict[str, float]:
    """Bytes of a rank that runs the teacher alone, itemized by name; arguments: see
    `training_memory`.
    """
    return {
        "libraries and buffers": base,
        **_forward_memory(teacher, setup, setup.own_teacher_ranks, lengths),
    }


def _forward_memory(
    teacher: ModelShape, setup: TrainingSetup, ranks: int, lengths: Sequence[int]
) -> dict[str, float]:
    """The weights of a teacher on `ranks` ranks, and what its forward pass needs."""
    dtype = setup.teacher_dtype
    sharded = setup.teacher_sharded and ranks > 1
    weights = setup.teacher_weights(teacher) / (ranks if sharded else 1)
    memory = {"teacher: weights": 0.0 if setup.offload_teacher else weights}
    if sharded or setup.offload_teacher:
        memory["teacher: gathered"] = parameter_bytes(_live_parameters(teacher), dtype)
    # Numbers of one token that are alive in a block, at most.
    per_token = teacher.block_parameters / max(teacher.width, 1)
    memory["teacher: forward"] = parameter_bytes(sum(lengths) * per_token, dtype)
    return memory


def host_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    setup: TrainingSetup,
    node_fraction: float,
    activations: float = 0.0,
) -> float:
    """Bytes of a node's own memory that offloading takes; node_fraction: of all ranks. activations:
    bytes that the checkpointing of a node's ranks keeps.
    """
    total = activations if setup.offload_activations else 0.0
    if setup.offload_student:
        total += 12 * student.trainable_parameters + 2 * student.parameters
    if teacher is not None and setup.offload_teacher and setup.teacher_mode == "online":
        total += parameter_bytes(teacher.parameters, setup.teacher_dtype)
    return total * node_fraction


def scoring_memory(
    student: ModelShape, dtype: str, device_memory: float, base: float, fraction: float
) -> dict[str, float]:
    """Bytes of vLLM in scoring: its weights, and the rest of its `fraction` of a device for the
    cache of keys and values.
    """
    weights = parameter_bytes(student.parameters, dtype)
    cache = max(0.0, device_memory * fraction - weights - base)
    return {"vLLM: weights": weights, "vLLM: cache": cache}


def checkpoint_bytes(student: ModelShape) -> float:
    """Bytes of a checkpoint: float32 weights and moments, 12 bytes for each trained parameter
    (`pocl bench checkpoint`).
    """
    return 12.0 * student.trainable_parameters


def _live_parameters(shape: ModelShape) -> float:
    """Parameters that ZeRO-3 holds complete on a rank: all up to LIVE_PARAMETERS, else two blocks
    and the embeddings.
    """
    if shape.parameters <= LIVE_PARAMETERS:
        return shape.parameters
    return max_gathered_parameters(shape)


def find_fitting_setup(
    memory: Callable[[TrainingSetup], float],
    setup: TrainingSetup,
    available: float,
    max_micro_batch_size: int,
    batch_size: int,
    ranks: int,
) -> TrainingSetup | None:
    """The setup with the largest micro-batch that fits, with as few changes as possible.

    Tries the setup itself, then activation checkpointing, then offloading the teacher, then the
    student. None if nothing fits. memory: bytes of a rank; available: bytes of its device.
    """
    candidates = [
        setup,
        replace(setup, checkpointing=True),
        replace(setup, checkpointing=True, offload_teacher=True),
        replace(setup, checkpointing=True, offload_teacher=True, offload_student=True),
    ]
    for candidate in candidates:
        fitting = find_largest_micro_batch(
            memory, candidate, available, max_micro_batch_size, batch_size, ranks
        )
        if fitting is not None:
            return fitting
    return None


def find_largest_micro_batch(
    memory: Callable[[TrainingSetup], float],
    setup: TrainingSetup,
    available: float,
    max_micro_batch_size: int,
    batch_size: int,
    ranks: int,
) -> TrainingSetup | None:
    """The setup with the largest micro-batch that fits and divides the batch; None if none does."""
    for size in range(max_micro_batch_size, 0, -1):
        candidate = replace(setup, micro_batch_size=size)
        divides = batch_size % (size * ranks) == 0
        if divides and memory(candidate) <= MAX_MEMORY_FRACTION * available:
            return candidate
    return None
