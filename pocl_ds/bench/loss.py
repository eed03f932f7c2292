"""Time and extra memory of output head and divergence alone: this package without and with a token
rule, plain full logits, and Liger's chunked loss if it is installed.

Forward and backward from hidden states to the gradients of hidden states and head, forward KL at
temperature 1. Contenders take turns in one process. Extra memory is the peak above what was
allocated before: of torch's allocator on a GPU, of the process on a CPU, whose high-water mark is
reset first.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocl_ds.bench.arguments import parse_integers
from pocl_ds.bench.peak_memory import peak_bytes, reset_peak
from pocl_ds.errors import RecipeError
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime.distributed import device

# tokens, ids, width
CPU_SHAPES = ((256, 49_152, 576), (1024, 49_152, 576), (512, 151_936, 256), (2048, 151_936, 256))
# Heads of SmolLM2-135M, OPT-1.3B and Gemma 3 1B, and one as wide as that of Llama 8B.
GPU_SHAPES = (
    (8192, 49_152, 576),
    (8192, 50_272, 2048),
    (8192, 262_144, 1152),
    (8192, 128_256, 4096),
)
ROUNDS = 5

Contender = Callable[[Tensor, nn.Parameter, Tensor, nn.Parameter, Tensor], Tensor]


@dataclass
class Row:
    """Measurements of one contender at one shape: seconds of each round, largest extra memory,
    and its loss per token.
    """

    name: str
    seconds: list[float]
    extra_mib: float
    loss: float


class Inputs(NamedTuple):
    """Hidden states [tokens, width] and heads [ids, width] of both sides, and labels [tokens]."""

    hidden: Tensor
    weight: nn.Parameter
    teacher_hidden: Tensor
    teacher_weight: nn.Parameter
    labels: Tensor


def draw_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random inputs of a shape (tokens, ids, width), always the same."""
    tokens, size, width = shape
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator, device=device).to(dtype)  # noqa: E731
    hidden, teacher_hidden = draw(tokens, width), draw(tokens, width)
    weight, teacher_weight = (nn.Parameter(draw(size, width) / width**0.5) for _ in range(2))
    labels = torch.randint(0, size, (tokens,), generator=generator, device=device)
    return Inputs(hidden, weight, teacher_hidden, teacher_weight, labels)


def run(
    arguments: Sequence[int | str] = (), out: Callable[[str], None] = print, *, rounds: int = ROUNDS
) -> list[list[Row]]:
    """Print and return a table for each shape. arguments: tokens, ids and width of one shape; by
    default the shapes above.

    float32 on CPUs, bfloat16 on GPUs. Raises RecipeError for any other number of arguments.
    """
    numbers = parse_integers(arguments, "tokens, ids or width")
    if len(numbers) not in (0, 3):
        raise RecipeError("give tokens, ids and width, as in 1024 49152 576, or nothing")
    on_gpu = device().type == "cuda"
    torch.set_num_threads(os.cpu_count() or 1)
    shapes: Sequence[tuple[int, int, int]] = GPU_SHAPES if on_gpu else CPU_SHAPES
    if numbers:
        shapes = [(numbers[0], numbers[1], numbers[2])]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    out(f"{machine}, {str(dtype)[6:]}, forward and backward, {rounds} rounds, median (min..max)")
    tables = []
    for shape in shapes:
        tables.append(_measure(shape, dtype, device(), rounds))
        out(f"\n{shape[0]} tokens x {shape[1]} ids x width {shape[2]}")
        for row in tables[-1]:
            times = [1000 * second for second in row.seconds]
            spread = f"({min(times):.0f}..{max(times):.0f})"
            out(
                f"{row.name:<18}{statistics.median(times):>9.1f} ms  "
                f"{spread:<16}{row.extra_mib:>8.0f} MiB   loss {row.loss:.5f}"
            )
    return tables


def contenders() -> dict[str, Contender]:
    """The contenders by name; Liger only if it is installed."""
    available: dict[str, Contender] = {"pocl": _fused, "plain full logits": _plain}
    liger = _liger()
    if liger:
        available["Liger chunked JSD"] = liger
    if device().type == "cuda":  # fewer chunks read and write the head's gradient less often
        available["pocl, 2 GiB chunks"] = partial(_fused, chunk_bytes=2 << 30)
    return available


def with_rules() -> dict[str, Contender]:
    """The same loss with a token rule: another loss, whose time is beside that of `pocl`."""
    return {"pocl, adakd": partial(_fused, rule=TokenRule.of("adakd", {"threshold": 0.2}))}


def _measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int
) -> list[Row]:
    hidden, weight, teacher_hidden, teacher_weight, labels = draw_inputs(shape, dtype, device)
    measured = contenders() | with_rules()
    rows = {name: Row(name, [], 0.0, 0.0) for name in measured}
    # The first round warms up and measures the memory, the others the time.
    for round_number in range(rounds + 1):
        for name, contender in measured.items():
            hidden.grad = weight.grad = None
            leaf = hidden.detach().requires_grad_()
            before = reset_peak(device) if round_number == 0 else 0
            start = time.perf_counter()
            loss = contender(leaf, weight, teacher_hidden, teacher_weight, labels)
            loss.backward()
            rows[name].loss = float(loss.detach())  # waits for a GPU
            if round_number:
                rows[name].seconds.append(time.perf_counter() - start)
            else:
                rows[name].extra_mib = (peak_bytes(device) - before) / 2**20
            del loss, leaf
    return list(rows.values())


def _fused(
    hidden: Tensor,
    weight: nn.Parameter,
    teacher_hidden: Tensor,
    teacher_weight: nn.Parameter,
    labels: Tensor,
    chunk_bytes: int | None = None,
    rule: TokenRule | None = None,
) -> Tensor:
    budget = {} if chunk_bytes is None else {"chunk_bytes": chunk_bytes}
    total, *_ = loss_sums(
        hidden,
        OutputHead(weight, None, 1.0, None),
        labels,
        LossTerms("fkl", token_rule=rule),
        vocab=VocabMap(len(weight)),
        teacher_hidden=teacher_hidden,
        teacher_head=OutputHead(teacher_weight, None, 1.0, None),
        **budget,
    )
    return total / len(labels)


def _plain(
    hidden: Tensor,
    weight: nn.Parameter,
    teacher_hidden: Tensor,
    teacher_weight: nn.Parameter,
    labels: Tensor,
) -> Tensor:
    log_q = functional.log_softmax(functional.linear(hidden, weight).float(), -1)
    with torch.no_grad():
        log_p = functional.log_softmax(
            functional.linear(teacher_hidden, teacher_weight).float(), -1
        )
    return functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(labels)


def _liger() -> Contender | None:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return None
    loss: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
    )
    return lambda hidden, weight, teacher_hidden, teacher_weight, labels: loss(
        hidden, weight, teacher_hidden, teacher_weight.detach(), labels
    )
