"""Time and extra memory of head and divergence alone: ours, plain full logits, Liger's chunked loss
where it is installed.

Forward and backward from hidden states to the gradients of hidden states and head, forward KL at
temperature = 1. Contenders take turns in one process; extra memory is the peak over what stood there
before: of the allocator on a GPU, of the process on a CPU, whose high-water mark is set back first.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocl_ds.bench.arguments import whole_numbers
from pocl_ds.errors import RecipeError
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import Head
from pocl_ds.models.vocab import Ids
from pocl_ds.runtime.distributed import device

# tokens, ids, width
CPU_SHAPES = ((256, 49_152, 576), (1024, 49_152, 576), (512, 151_936, 256), (2048, 151_936, 256))
GPU_SHAPES = ((2048, 49_152, 576), (8192, 49_152, 576), (8192, 128_256, 4096))
ROUNDS = 5

Contender = Callable[[Tensor, nn.Parameter, Tensor, nn.Parameter, Tensor], Tensor]


@dataclass
class Row:
    """What one contender took at one shape: seconds of each round, largest extra MiB, and its loss
    a token.
    """

    name: str
    seconds: list[float]
    extra_mib: float
    loss: float


def run(
    arguments: Sequence[int | str] = (), out: Callable[[str], None] = print, *, rounds: int = ROUNDS
) -> list[list[Row]]:
    """Print and return a table a shape. arguments: tokens, ids and width of one shape; the device's
    own shapes without.

    float32 on CPUs, bfloat16 on GPUs. Raises RecipeError for arguments of another number, or that
    are no numbers.
    """
    numbers = whole_numbers(arguments, "tokens, ids or width")
    if len(numbers) not in (0, 3):
        raise RecipeError("give tokens, ids and width, as in 1024 49152 576, or nothing")
    where = device()
    on_gpu = where.type == "cuda"
    torch.set_num_threads(os.cpu_count() or 1)
    shapes = (
        ((numbers[0], numbers[1], numbers[2]),) if numbers else GPU_SHAPES if on_gpu else CPU_SHAPES
    )
    kind = torch.bfloat16 if on_gpu else torch.float32
    out(
        f"{torch.cuda.get_device_name() if on_gpu else f'{os.cpu_count()} CPU cores'}, "
        f"{str(kind)[6:]}, forward and backward, "
        f"{rounds} rounds, median (least..most)"
    )
    tables = []
    for shape in shapes:
        tables.append(_shape(shape, kind, where, rounds))
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
    """By name; Liger's only where it is installed."""
    found: dict[str, Contender] = {"ours": _ours, "plain full logits": _plain}
    liger = _liger()
    return found | ({"Liger chunked JSD": liger} if liger else {})


def _shape(
    shape: tuple[int, int, int], kind: torch.dtype, where: torch.device, rounds: int
) -> list[Row]:
    tokens, size, width = shape
    source = torch.Generator(where).manual_seed(0)
    draw = lambda *sizes: torch.randn(
        *sizes, generator=source, device=where, dtype=torch.float32
    ).to(kind)
    hidden, teacher_hidden = draw(tokens, width), draw(tokens, width)
    weight, teacher_weight = (nn.Parameter(draw(size, width) / width**0.5) for _ in range(2))
    labels = torch.randint(0, size, (tokens,), generator=source, device=where)
    rows = {name: Row(name, [], 0.0, 0.0) for name in contenders()}
    for turn in range(rounds + 1):  # the first warms up and tells the memory, the others the time
        for name, contender in contenders().items():
            hidden.grad = weight.grad = None
            leaf = hidden.detach().requires_grad_()
            before = _start(where) if turn == 0 else 0
            begin = time.perf_counter()
            loss = contender(leaf, weight, teacher_hidden, teacher_weight, labels)
            loss.backward()
            rows[name].loss = float(loss.detach())  # waits for a GPU
            if turn:
                rows[name].seconds.append(time.perf_counter() - begin)
            else:
                rows[name].extra_mib = (_stop(where) - before) / 2**20
            del loss, leaf
    return list(rows.values())


def _ours(
    hidden: Tensor,
    weight: nn.Parameter,
    teacher_hidden: Tensor,
    teacher_weight: nn.Parameter,
    labels: Tensor,
) -> Tensor:
    heads = Head(weight, None, 1.0, None), Head(teacher_weight, None, 1.0, None)
    total, *_ = loss_sums(
        hidden,
        heads[0],
        labels,
        LossTerms("fkl"),
        ids=Ids(len(weight)),
        teacher_hidden=teacher_hidden,
        teacher_head=heads[1],
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
    return lambda hidden, weight, other, other_weight, labels: loss(
        hidden, weight, other, other_weight.detach(), labels
    )


def _start(where: torch.device) -> int:
    """Bytes in use now; the peak counts from here."""
    gc.collect()
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or a later turn could hide in it
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _stop(where: torch.device) -> int:
    if where.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
