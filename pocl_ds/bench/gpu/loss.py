"""Part `loss`: the contenders of `pocl bench loss` at four shapes, each with its time, its extra
memory, and the error of its gradients.

The error is the largest relative difference, in the Euclidean norm, of the gradients of hidden
states and head from float64 ones of the same inputs.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pocl_ds.bench.gpu.rows import Row, RowWriter
from pocl_ds.bench.loss import GPU_SHAPES, Contender, Inputs, contenders, draw_inputs
from pocl_ds.bench.peak_memory import peak_bytes, reset_peak
from pocl_ds.runtime import distributed

DRY_RUN_SHAPES = ((96, 1000, 32), (64, 2000, 16), (128, 500, 64), (64, 3000, 32))
ROUNDS = 8
ERROR_TOKENS = 1024  # float64 is slow on most cards
CHUNK = 256  # tokens whose logits the float64 form holds at a time


def main(rows: RowWriter, *, rounds: int = ROUNDS) -> None:
    """Write a row for each shape and contender."""
    on_gpu = distributed.device_type() == "cuda"
    for tokens, ids, width in GPU_SHAPES if on_gpu else DRY_RUN_SHAPES:
        group = f"{tokens:,} tokens × {ids:,} ids × width {width:,}"
        for name, contender in contenders().items():
            measurement = partial(measure_loss, contender, (tokens, ids, width), rounds)
            rows.measure({"group": group, "name": name}, measurement)


def measure_loss(contender: Contender, shape: tuple[int, int, int], rounds: int) -> Row:
    """Seconds of each round, extra bytes, and the error of the gradients."""
    device = distributed.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = draw_inputs(shape, dtype, device)
    seconds, extra_bytes = [], 0
    # The first round warms up and measures the memory.
    for round_number in range(rounds + 1):
        before = reset_peak(device) if round_number == 0 else 0
        start = time.perf_counter()
        gradients(contender, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if round_number:
            seconds.append(time.perf_counter() - start)
        else:
            extra_bytes = peak_bytes(device) - before
    return {
        "seconds": seconds,
        "extra_bytes": extra_bytes,
        "gradient_error": gradient_error(contender, first_tokens(inputs, ERROR_TOKENS)),
    }


def gradients(contender: Contender, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Gradients of the loss per token, of hidden states and head, as the contender computes it."""
    hidden = inputs.hidden.detach().requires_grad_()
    inputs.weight.grad = None
    loss = contender(
        hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
    )
    loss.backward()
    assert hidden.grad is not None and inputs.weight.grad is not None
    return hidden.grad, inputs.weight.grad


def first_tokens(inputs: Inputs, count: int) -> Inputs:
    """The inputs with their first tokens only."""
    return inputs._replace(
        hidden=inputs.hidden[:count],
        teacher_hidden=inputs.teacher_hidden[:count],
        labels=inputs.labels[:count],
    )


def gradient_error(contender: Contender, inputs: Inputs) -> float:
    """The largest relative error of the two gradients."""
    pairs = zip(gradients(contender, inputs), exact_gradients(inputs), strict=True)
    return max(float((value.double() - exact).norm() / exact.norm()) for value, exact in pairs)


@torch.no_grad()
def exact_gradients(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Gradients of the forward KL divergence per token in float64: with respect to the student's
    logits it is (q - p) / tokens (docs/method.md, eq. 11 and 27).
    """
    weight, teacher_weight = inputs.weight.double(), inputs.teacher_weight.double()
    head, parts = torch.zeros_like(weight), []
    for hidden, teacher_hidden in zip(
        inputs.hidden.double().split(CHUNK),
        inputs.teacher_hidden.double().split(CHUNK),
        strict=True,
    ):
        logits = (hidden @ weight.T).softmax(-1)
        logits -= (teacher_hidden @ teacher_weight.T).softmax(-1)
        logits /= len(inputs.hidden)
        head += logits.T @ hidden
        parts.append(logits @ weight)
    return torch.cat(parts), head


if __name__ == "__main__":
    main(RowWriter(Path(sys.argv[1])))
