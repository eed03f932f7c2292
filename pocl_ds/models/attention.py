"""`per_sample` attention: causal within each sample, without a mask, for padded and packed rows.

transformers separates the samples of a packed row with a mask over the whole row. That costs n
times the work for n samples, and prevents the use of torch's fastest kernels. Padding on the right
needs no mask either, since no real token attends to its right. So this attention only passes
`is_causal` to torch's kernels.

Shapes: B rows, T positions, H heads, G heads of keys and values, d width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pocl_ds.errors import ModelError

PER_SAMPLE = "per_sample"
# Families (`model_type`) for which a test compares it with the model's own attention. Another
# family may need its mask, for chunks, biases or a prefix.
FAMILIES = (
    "gpt2",
    "opt",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "phi",
    "phi3",
    "gpt_neox",
    "granite",
    "cohere",
    "cohere2",
)


@dataclass(frozen=True)
class PackedSamples:
    """The samples of a packed row, by their lengths. Models pass it down to `per_sample`."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def padded_positions(self) -> Tensor:
        """Where each token would be if the samples were padded to the longest: [T] int64."""
        longest = max(self.lengths)
        positions = [
            torch.arange(length) + number * longest for number, length in enumerate(self.lengths)
        ]
        return torch.cat(positions).to(self.device, non_blocking=True)


def per_sample(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    samples: PackedSamples | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls for attn_implementation=per_sample.

    Args:
        query: [B, H, T, d]; key, value: [B, G, T, d].
        attention_mask: None, since transformers makes no mask for an attention it does not know.
        samples: of a packed row (B = 1); None if rows are padded on the right.

    Returns:
        The output [B, T, H, d], and None in place of attention weights.

    Raises:
        ValueError: keys come from a cache, as in generation.
        ModelError: the model has attention sinks (s_aux).
    """
    if s_aux is not None:
        raise ModelError(
            "the model has attention sinks, which attn_implementation=per_sample ignores: set its "
            "attn_implementation=eager"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError("attn_implementation=per_sample is for training: generate with sdpa")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend(query, key, value, scaling, dropout, sliding_window, softcap).transpose(1, 2)

    if samples is None or len(samples.lengths) == 1:
        return attend(query, key, value).contiguous(), None
    if _prefers_small_calls(query.device):
        pieces = zip(
            *(side.split(samples.lengths, dim=2) for side in (query, key, value)), strict=True
        )
        return torch.cat([attend(*piece) for piece in pieces], dim=1), None
    padded = attend(_pad(query, samples), _pad(key, samples), _pad(value, samples))
    return padded.flatten(0, 1).index_select(0, samples.padded_positions)[None], None


def check_attention(attention: str | None, config: Any) -> None:
    """Raise ModelError for a model family that was not tested without its mask."""
    if attention == PER_SAMPLE and config.model_type not in FAMILIES:
        raise ModelError(
            f"attn_implementation=per_sample is not tested with models of the family "
            f"{config.model_type!r}, which may need their mask: set their "
            "attn_implementation=eager, or sdpa if they have it"
        )


def _prefers_small_calls(device: torch.device) -> bool:
    """CPUs are faster with a call for each sample, GPUs with one call over padded samples."""
    return device.type == "cpu"


def _pad(side: Tensor, samples: PackedSamples) -> Tensor:
    """A packed row [1, N, T, d] as one row for each sample: [samples, N, longest, d]."""
    count, longest = len(samples.lengths), max(samples.lengths)
    rows = side[0].transpose(0, 1)  # [T, N, d]
    padded = rows.new_zeros(count * longest, *rows.shape[1:]).index_copy(
        0, samples.padded_positions, rows
    )
    return padded.unflatten(0, (count, longest)).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention [B, H, T, d]. window: tokens that a token attends to, itself included."""
    length, grouped = query.shape[2], key.shape[1] != query.shape[1]
    band = None
    if window is not None and window < length:
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        band = causal.triu(1 - window)
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=band,
            is_causal=band is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
    # torch has no kernel that caps scores (Gemma 2) with softcap * tanh(scores / softcap).
    if grouped:
        key, value = (
            side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value)
        )
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    visible = (
        band
        if band is not None
        else torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    )
    weights = scores.masked_fill(~visible, -math.inf).softmax(
        -1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return functional.dropout(weights.to(query.dtype), dropout) @ value
