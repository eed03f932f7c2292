"""How large a run is before it starts: memory of a rank, arithmetic, traffic, hours. Pure numbers
from two configurations.

Memory is counted by what holds it, at the moment when it is fullest. What ZeRO-3 does follows from
the shipped ds_configs: shards of weights, gradients and Adam's states, two blocks gathered (all
weights, where they are fewer than `stage3_max_live_parameters`), one bucket that is reduced. Times
are arithmetic over a stated share of the peak, or traffic over the links where that takes longer;
generation is bound by reading weights and caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pocl_ds.models.cost import ModelShape, max_gathered_parameters, kv_cache_bytes, parameter_bytes

LIVE_PARAMETERS = 1e9  # ds_configs: stage3_max_live_parameters
BUCKET = 5e7  # ds_configs: numbers reduced, or prefetched, at once
MAX_MEMORY_FRACTION = 0.92  # of a device's memory may be planned for
GB = 1e9
GLOO = 200e6  # buffers of its own, between CPUs


@dataclass(frozen=True)
class Device:
    """What a rank runs on. Peaks as their makers state them, without sparsity."""

    name: str
    memory: float  # bytes
    flops: float  # a second in bfloat16
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second to its neighbours in the node, one way
    base: float  # bytes that context, libraries and communication buffers take


GPUS = {
    gpu.name: gpu
    for gpu in (
        Device("h200-141g", 141e9, 989e12, 4.8e12, 450e9, 2.5e9),
        Device("h100-80g", 80e9, 989e12, 3.35e12, 450e9, 2.5e9),
        Device("a100-80g", 80e9, 312e12, 2.0e12, 300e9, 2.0e9),
        Device("a100-40g", 40e9, 312e12, 1.55e12, 300e9, 2.0e9),
        Device("l40s-48g", 48e9, 362e12, 0.86e12, 32e9, 2.0e9),
        Device("a6000-48g", 48e9, 155e12, 0.77e12, 32e9, 2.0e9),
        Device("rtx4090-24g", 24e9, 165e12, 1.0e12, 25e9, 2.0e9),
    )
}


@dataclass(frozen=True)
class ClusterLayout:
    """Ranks: nodes x ranks of a node, and the network of a node in bytes a second."""

    nodes: int
    ranks_per_node: int
    network: float = 50e9

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.ranks_per_node

    def link(self, device: Device) -> float:
        """Bytes a second that a rank gets in a collective call over all ranks."""
        return (
            device.link if self.nodes == 1 else min(device.link, self.network / self.ranks_per_node)
        )


@dataclass(frozen=True)
class TrainingWork:
    """What is trained on."""

    samples: int
    prompt_tokens: float  # mean
    response_tokens: float  # mean, EOS included
    max_length: int
    batch_size: int
    steps: int  # of the whole plan

    @property
    def tokens(self) -> float:
        """Of one sample."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class TrainingSetup:
    """What a recipe decides about memory."""

    micro_batch_size: int
    checkpointing: bool = False
    offload_student: bool = False
    offload_teacher: bool = False
    mode: str = "online"  # live, hidden, topk, or none for SFT
    dtype: str = "bfloat16"
    teacher_dtype: str = "bfloat16"
    sharded: bool = True  # by ZeRO-3; else whole, in plain PyTorch
    teacher_sharded: bool = True
    teacher_quantised: float | None = (
        None  # bytes of a weight of the teacher's linear modules, where it is quantised
    )
    chunk_bytes: int = 512 << 20
    record_bytes: int = 292  # of a token, where mode is topk

    def teacher_weights(self, teacher: ModelShape) -> float:
        """Bytes of the whole teacher."""
        quantised = 0.0 if self.teacher_quantised is None else float(teacher.matrix_parameters)
        return parameter_bytes(teacher.parameters - quantised, self.teacher_dtype) + quantised * (
            self.teacher_quantised or 0
        )

    def teacher_width(self, teacher: ModelShape) -> float:
        """Bytes that are kept of a loss token."""
        return (
            self.record_bytes
            if self.mode == "cached_topk"
            else parameter_bytes(teacher.width, self.teacher_dtype)
        )


Activations = Callable[
    [Sequence[int], bool], float
]  # lengths of a micro-batch, checkpointing -> bytes


def training_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    choice: TrainingSetup,
    ranks: int,
    lengths: Sequence[int],
    loss_tokens: int,
    activations: Activations,
    base: float,
    *,
    gloo: bool = False,
) -> dict[str, float]:
    """Bytes of one rank in a step, by what holds them, for a micro-batch of these lengths.

    gloo: between CPUs, where what is gathered lies there twice more on its way (`pocl bench size`).
    """
    over = ranks if choice.sharded else 1
    shard, trained = (student.parameters + student.adapters) / over, student.trained / over
    mixed = choice.dtype != "float32"
    kept: dict[str, float] = {"libraries and buffers": base}
    on_host = choice.offload_student
    # Mixed precision: weights, gradients and a float32 copy; in float32 ZeRO-3 holds a flat copy
    # too.
    kept["student: weights"] = 0.0 if on_host else parameter_bytes(shard, choice.dtype)
    kept["student: gradients"] = 4.0 * trained  # summed over micro-batches in float32 (ds_configs/)
    copies = 3 if mixed or choice.sharded else 2
    kept["student: optimizer"] = 0.0 if on_host else 4.0 * copies * trained
    if choice.sharded:
        kept["student: gathered"] = parameter_bytes(_live(student), choice.dtype)
        kept["student: bucket"] = 2 * parameter_bytes(min(BUCKET, student.trained), choice.dtype)
    kept["student: activations"] = activations(lengths, choice.checkpointing)
    if choice.checkpointing:
        kept["student: activations"] += (
            activations(lengths, False) / student.layers
        )  # one block is computed again
    kept["logits"] = min(
        float(choice.chunk_bytes), loss_tokens * student.rows * _logit_bytes(choice.dtype)
    )
    if not student.adapters:
        kept["head's gradient"] = (
            6.0 if mixed else 4.0
        ) * student.head_parameters  # in float32, then in its own type
        kept["embeddings' gradient"] = parameter_bytes(student.head_parameters, choice.dtype)
    if choice.sharded and not on_host:
        kept["student: gradient of the update"] = 4.0 * trained  # the shard once more, flat
    if teacher is not None and choice.mode == "online":
        sharded = choice.teacher_sharded and ranks > 1
        weights = choice.teacher_weights(teacher) / (ranks if sharded else 1)
        kept["teacher: weights"] = 0.0 if choice.offload_teacher else weights
        if sharded or choice.offload_teacher:
            kept["teacher: gathered"] = parameter_bytes(_live(teacher), choice.teacher_dtype)
        widest = teacher.block_parameters / max(
            teacher.width, 1
        )  # numbers of a token alive in a block, at most
        kept["teacher: forward"] = parameter_bytes(sum(lengths) * widest, choice.teacher_dtype)
    elif teacher is not None and choice.mode == "cached_hidden_states":
        kept["teacher: head"] = parameter_bytes(teacher.head_parameters, choice.teacher_dtype)
    if gloo and ranks > 1 and choice.sharded:
        kept["on the way between ranks"] = GLOO + 2 * kept["student: gathered"]
    return kept


def host_memory(
    student: ModelShape, teacher: ModelShape | None, choice: TrainingSetup, layout: ClusterLayout
) -> float:
    """Bytes of a node's own memory that offloading takes."""
    share = layout.ranks_per_node / layout.ranks
    found = (
        (12 * student.trained + 2 * student.parameters) * share if choice.offload_student else 0.0
    )
    if teacher is not None and choice.offload_teacher and choice.mode == "online":
        found += parameter_bytes(teacher.parameters, choice.teacher_dtype) * share
    return found


def _live(shape: ModelShape) -> float:
    """Weights whole on a rank at once: all, where ZeRO-3 may keep so many, else two blocks and the
    embeddings.
    """
    return shape.parameters if shape.parameters <= LIVE_PARAMETERS else max_gathered_parameters(shape)


def _logit_bytes(dtype: str) -> float:
    """Of one loss token and id: logits of both sides."""
    return 2.0 * (4 if dtype == "float32" else 2)


def scoring_memory(
    student: ModelShape, dtype: str, device: Device, share: float
) -> dict[str, float]:
    """vLLM in scoring: its weights, and what its cache of keys and values gets."""
    weights = parameter_bytes(student.parameters, dtype)
    return {
        "vLLM: weights": weights,
        "vLLM: cache": max(0.0, device.memory * share - weights - device.base),
    }


def step_flops(
    student: ModelShape,
    teacher: ModelShape | None,
    choice: TrainingSetup,
    lengths: Sequence[int],
    loss_tokens: int,
) -> float:
    """Of one step: forward, and twice that backward; the body once more with activation
    checkpointing. Frozen weights hand their gradient on and have none.
    """
    body, passes = student.forward_flops(lengths, 0), 4 if choice.checkpointing else 3
    head = 2.0 * student.head_parameters * loss_tokens
    total = passes * body + 3 * head
    if student.adapters:
        total += 2.0 * sum(lengths) * (passes * student.adapters - student.matrix_parameters) - head
    if teacher is not None and choice.mode == "online":
        total += teacher.forward_flops(lengths, loss_tokens)
    elif teacher is not None and choice.mode == "cached_hidden_states":
        total += 2.0 * teacher.head_parameters * loss_tokens
    return total


def micro_step_traffic(
    student: ModelShape, teacher: ModelShape | None, choice: TrainingSetup, ranks: int
) -> float:
    """Bytes that each rank receives in one micro-step: weights gathered, gradients scattered."""
    if not choice.sharded or ranks == 1:
        return 0.0
    passes = (
        1 if student.parameters <= LIVE_PARAMETERS else 2
    )  # kept from forward to backward, or gathered again
    numbers = passes * float(student.parameters) + student.trained
    found = parameter_bytes(numbers, choice.dtype)
    if teacher is not None and choice.mode == "online" and choice.teacher_sharded:
        found += parameter_bytes(float(teacher.parameters), choice.teacher_dtype)
    return found * (ranks - 1) / ranks


@dataclass(frozen=True)
class StepTime:
    """Seconds of a stage, and what they are made of."""

    name: str
    seconds: float
    flops: float
    why: str


def step_times(
    student: ModelShape,
    teacher: ModelShape | None,
    choice: TrainingSetup,
    work: TrainingWork,
    layout: ClusterLayout,
    device: Device,
    *,
    utilisation: float,
    max_new_tokens: int,
    sequences: int,
) -> list[StepTime]:
    """Scoring, teaching and training, in order. Preparing, evaluation and reports are not counted."""
    rate = device.flops * (1 if choice.dtype != "float32" else 0.5) * utilisation
    found = [_scoring(student, work, layout, device, rate, max_new_tokens, sequences)]
    length, loss = max(1, round(work.tokens)), work.response_tokens
    if teacher is not None and choice.mode in ("cached_hidden_states", "cached_topk"):
        flops = work.samples * teacher.forward_flops([length], round(loss))
        found.append(StepTime("cache-teacher", flops / rate / layout.ranks, flops, "arithmetic"))
    found.append(_training(student, teacher, choice, work, layout, device, rate))
    return found


def _training(
    student: ModelShape,
    teacher: ModelShape | None,
    choice: TrainingSetup,
    work: TrainingWork,
    layout: ClusterLayout,
    device: Device,
    rate: float,
) -> StepTime:
    lengths, loss = (
        [max(1, round(work.tokens))] * work.batch_size,
        round(work.response_tokens * work.batch_size),
    )
    flops = step_flops(student, teacher, choice, lengths, loss)
    compute = flops / rate / layout.ranks
    micro = max(1, work.batch_size // (choice.micro_batch_size * layout.ranks))
    traffic = micro * micro_step_traffic(student, teacher, choice, layout.ranks) / layout.link(device)
    why = "arithmetic" if compute >= traffic else "the network"
    return StepTime("train", work.steps * max(compute, traffic), work.steps * flops, why)


def _scoring(
    student: ModelShape,
    work: TrainingWork,
    layout: ClusterLayout,
    device: Device,
    rate: float,
    max_new_tokens: int,
    sequences: int,
) -> StepTime:
    """Each step of generation reads the weights once for all sequences in flight, and their keys
    and values.
    """
    new = work.samples * max_new_tokens
    prompt = student.forward_flops([max(1, round(work.prompt_tokens))], 0) * work.samples
    flops = prompt + new * 2.0 * (student.matrix_parameters + student.head_parameters)
    weights = parameter_bytes(student.parameters, "bfloat16")
    cached = (
        kv_cache_bytes(student, round(work.prompt_tokens + max_new_tokens / 2), "bfloat16")
        * sequences
    )
    reads = new / sequences * (weights + cached) / device.bandwidth
    seconds = max(flops / rate, reads) / layout.ranks
    return StepTime(
        "score",
        seconds,
        flops,
        "arithmetic" if flops / rate >= reads else "reading weights and caches",
    )


def find_fitting_setup(
    memory: Callable[[TrainingSetup], float],
    choice: TrainingSetup,
    available: float,
    most: int,
    batch_size: int,
    ranks: int,
) -> TrainingSetup | None:
    """The choice with the largest micro-batch that fits, asking for as little else as possible;
    None where nothing does.

    memory: bytes of a rank. most: largest micro-batch tried. First as asked; then with activation
    checkpointing; then with weights and optimizer in the node's own memory.
    """
    ways = [
        choice,
        replace(choice, checkpointing=True),
        replace(choice, checkpointing=True, offload_teacher=True),
        replace(choice, checkpointing=True, offload_teacher=True, offload_student=True),
    ]
    found = (find_largest_micro_batch(memory, way, available, most, batch_size, ranks) for way in ways)
    return next((choice for choice in found if choice is not None), None)


def find_largest_micro_batch(
    memory: Callable[[TrainingSetup], float],
    choice: TrainingSetup,
    available: float,
    most: int,
    batch_size: int,
    ranks: int,
) -> TrainingSetup | None:
    """The choice with the largest micro-batch that fits and divides the batch, nothing else
    changed; None where none does.
    """
    sizes = (size for size in range(most, 0, -1) if batch_size % (size * ranks) == 0)
    tried = (replace(choice, micro_batch_size=size) for size in sizes)
    return next((one for one in tried if memory(one) <= MAX_MEMORY_FRACTION * available), None)


def checkpoint_bytes(student: ModelShape) -> float:
    """Weights, moments and what else a checkpoint holds: 12 bytes a trained parameter (`pocl bench
    checkpoint`).
    """
    return 12.0 * student.trained
