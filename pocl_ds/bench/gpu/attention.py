"""Part `attention`: causal attention over the samples of a packed row, forward and backward.

Contenders: `per_sample` (this package); torch's attention over the whole row with a mask, as
transformers does it; torch's attention over the samples, padded in every call. The error is the
largest relative difference, in the Euclidean norm, of the output and the
gradients of query, key and value from float64 ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pocl_ds.bench.gpu.pairs import instruction_lengths
from pocl_ds.bench.gpu.rows import NotAvailable, Row, RowWriter
from pocl_ds.bench.peak_memory import peak_bytes, reset_peak
from pocl_ds.models.attention import per_sample
from pocl_ds.models.attention_choice import AttentionCall, kernel_for
from pocl_ds.models.packed_samples import PackedSamples
from pocl_ds.runtime import distributed

ROUNDS = 10


@dataclass(frozen=True)
class Shape:
    """Heads of queries, and of keys and values; width of a head; tokens of each sample."""

    name: str
    heads: int
    key_value_heads: int
    width: int
    lengths: tuple[int, ...]
    window: int | None = None  # tokens that a token attends to, itself included
    softcap: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(self.lengths)


# Query [1, H, T, d], key and value [1, G, T, d] -> output [1, T, H, d].
Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

_INSTRUCTIONS = tuple(total for _, total in instruction_lengths())
GPU_SHAPES = (
    Shape("Llama 1B, 64 instruction samples", 32, 8, 64, _INSTRUCTIONS),
    Shape("Llama 8B, 8 samples of 2048 tokens", 32, 8, 128, (2048,) * 8),
    Shape("Llama 8B, window of 512, 8 samples of 2048 tokens", 32, 8, 128, (2048,) * 8, window=512),
    Shape("Gemma 2 2B, soft cap, 64 instruction samples", 8, 4, 256, _INSTRUCTIONS, softcap=50.0),
)
DRY_RUN_SHAPES = (
    Shape("four heads", 4, 2, 16, (9, 5, 1, 7)),
    Shape("window of 3", 4, 2, 16, (9, 5, 1, 7), window=3),
    Shape("soft cap", 4, 2, 16, (9, 5, 1, 7), softcap=2.0),
)


def main(rows: RowWriter, *, rounds: int = ROUNDS) -> None:
    """Write a row for each shape and contender."""
    on_gpu = distributed.device_type() == "cuda"
    contenders = {
        "pocl, per_sample": packed_attention,
        "torch, one row with a mask": masked_attention,
        "torch, padded samples": padded_attention,
    }
    for shape in GPU_SHAPES if on_gpu else DRY_RUN_SHAPES:
        group = f"{shape.name}: {shape.tokens:,} tokens"
        for name, contender in contenders.items():
            measurement = partial(measure_attention, contender, shape, rounds)
            rows.measure({"group": group, "name": name}, measurement)


def packed_attention(shape: Shape, device: torch.device) -> Attention:
    """This package's attention of training."""
    samples = PackedSamples(shape.lengths, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, _ = per_sample(
            None,
            query,
            key,
            value,
            None,
            sliding_window=shape.window,
            softcap=shape.softcap,
            samples=samples,
        )
        return output

    return attend


def masked_attention(shape: Shape, device: torch.device) -> Attention:
    """Attention over the whole row; the mask [T, T] keeps the samples apart."""
    _check_soft_cap(shape)
    mask = visible_tokens(shape, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _torch_attention(query, key, value, mask).transpose(1, 2)

    return attend


def padded_attention(shape: Shape, device: torch.device) -> Attention:
    """Attention over the samples, each padded to the longest."""
    _check_soft_cap(shape)
    band = None
    if shape.window is not None:
        longest = max(shape.lengths)
        band = visible_tokens(replace(shape, lengths=(longest,)), device)

    def pad(side: Tensor) -> Tensor:
        samples = side[0].transpose(0, 1).split(shape.lengths)  # [t, heads, d] each
        return pad_sequence(list(samples), batch_first=True).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = _torch_attention(pad(query), pad(key), pad(value), band)
        rows = [row[:, :length] for row, length in zip(output, shape.lengths, strict=True)]
        return torch.cat(rows, dim=1).transpose(0, 1)[None]

    return attend


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention, or with a mask in its place. Torch's fast kernels that take a mask have no
    groups of heads, so keys and values are repeated, as transformers does it.
    """
    if mask is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def visible_tokens(shape: Shape, device: torch.device) -> Tensor:
    """Which tokens of a packed row each token attends to: [T, T]."""
    sample = torch.repeat_interleave(
        torch.arange(len(shape.lengths), device=device),
        torch.tensor(shape.lengths, device=device),
    )
    position = torch.arange(shape.tokens, device=device)
    distance = position[:, None] - position
    visible = (sample[:, None] == sample) & (distance >= 0)
    return visible if shape.window is None else visible & (distance < shape.window)


def _check_soft_cap(shape: Shape) -> None:
    if shape.softcap is not None:
        raise NotAvailable("torch's kernels have no soft cap")


def measure_attention(
    contender: Callable[[Shape, torch.device], Attention], shape: Shape, rounds: int
) -> Row:
    """Seconds of each round, extra bytes, and the error."""
    device = distributed.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attend, sides = contender(shape, device), draw_sides(shape, dtype, device)
    seconds, extra_bytes = [], 0
    # The first round warms up, the second one measures the memory.
    for round_number in range(rounds + 2):
        before = reset_peak(device) if round_number == 1 else 0
        start = time.perf_counter()
        outputs_and_gradients(attend, sides)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if round_number > 1:
            seconds.append(time.perf_counter() - start)
        elif round_number:
            extra_bytes = peak_bytes(device) - before
    row = {
        "seconds": seconds,
        "extra_bytes": extra_bytes,
        "error_norm": error(attend, sides, shape),
    }
    if contender is packed_attention:
        call = AttentionCall(device.type, dtype, shape.width, shape.softcap)
        row["kernel"] = kernel_for(call)
    return row


def draw_sides(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random query [1, H, T, d], key and value [1, G, T, d], always the same."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (shape.heads, shape.key_value_heads, shape.key_value_heads)
    return [
        torch.randn(1, count, shape.tokens, shape.width, generator=generator, device=device).to(
            dtype
        )
        for count in heads
    ]


def outputs_and_gradients(attend: Attention, sides: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of query, key and value if that of the output is the output."""
    leaves = [side.detach().requires_grad_() for side in sides]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, output.detach())]


def error(attend: Attention, sides: list[Tensor], shape: Shape) -> float:
    """The largest relative error of the four tensors."""
    exact = outputs_and_gradients(
        lambda *wide: exact_attention(shape, *wide), [side.double() for side in sides]
    )
    pairs = zip(outputs_and_gradients(attend, sides), exact, strict=True)
    return max(float((value.double() - true).norm() / true.norm()) for value, true in pairs)


def exact_attention(shape: Shape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by its definition, a sample at a time: [1, T, H, d]."""
    outputs = []
    for side in zip(
        *(side.split(shape.lengths, dim=2) for side in (query, key, value)), strict=True
    ):
        own_query, own_key, own_value = side
        groups = shape.heads // shape.key_value_heads
        own_key, own_value = (part.repeat_interleave(groups, 1) for part in (own_key, own_value))
        scores = own_query @ own_key.transpose(2, 3) / shape.width**0.5
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        visible = visible_tokens(replace(shape, lengths=(own_query.shape[2],)), query.device)
        outputs.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ own_value)
    return torch.cat(outputs, dim=2).transpose(1, 2)


if __name__ == "__main__":
    main(RowWriter(Path(sys.argv[1])))
