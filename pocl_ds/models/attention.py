"""Attention that looks at each sample alone: causal, without a mask, whether samples are padded or
packed.

transformers keeps the samples of a packed row apart with a mask over the whole row: n samples cost
n times the work of looking at each alone, and a mask keeps torch from its fastest kernels. Padding
on the right needs no mask either, since no real token looks to its right. So the only thing asked
of torch's kernels here is `is_causal`.

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
# Families (`model_type`) whose own attention tests hold it to. Another's may lie in its mask:
# chunks, biases, a prefix.
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
    """The samples that lie behind one another in a packed row, by their lengths. Models hand it
    down to `per_sample`.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def place(self) -> Tensor:
        """Where each token would lie if the samples were padded to the longest: [T] int64."""
        longest = max(self.lengths)
        each = [
            torch.arange(length) + number * longest for number, length in enumerate(self.lengths)
        ]
        return torch.cat(each).to(self.device, non_blocking=True)


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
    """What transformers calls in place of its own attention: [B, T, H, d] of query [B, H, T, d],
    key, value [B, G, T, d].

    samples: of a packed row (B = 1); None where rows are padded on the right. attention_mask is
    None: transformers makes none for an attention that it does not know. Raises ValueError for keys
    out of a cache: this is not for generation; ModelError for attention sinks (s_aux).
    """
    if s_aux is not None:
        raise ModelError(
            "the model has attention sinks, which attention=per_sample leaves out: set its "
            "attention=eager"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError("attention=per_sample is for training: generate with sdpa")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend(query, key, value, scaling, dropout, sliding_window, softcap).transpose(1, 2)

    if samples is None or len(samples.lengths) == 1:
        return attend(query, key, value).contiguous(), None
    if _one_by_one(query.device):
        pieces = zip(
            *(side.split(samples.lengths, dim=2) for side in (query, key, value)), strict=True
        )
        return torch.cat([attend(*piece) for piece in pieces], dim=1), None
    padded = attend(_pad(query, samples), _pad(key, samples), _pad(value, samples))
    return padded.flatten(0, 1).index_select(0, samples.place)[None], None


def check_attention(attention: str | None, config: Any) -> None:
    """Raise ModelError where a model of this configuration would run without its mask, and nobody
    looked whether it needs it.
    """
    if attention == PER_SAMPLE and config.model_type not in FAMILIES:
        raise ModelError(
            f"attention=per_sample is not held to what models of the family {config.model_type!r} "
            f"do, which may lie in their "
            "mask: set their attention=eager, or sdpa where they have it"
        )


def _one_by_one(device: torch.device) -> bool:
    """Many small calls that do no work in vain, which CPUs like; GPUs like one call, padded."""
    return device.type == "cpu"


def _pad(side: Tensor, samples: PackedSamples) -> Tensor:
    """A packed row [1, N, T, d] as one row a sample: [samples, N, longest, d]."""
    count, longest = len(samples.lengths), max(samples.lengths)
    rows = side[0].transpose(0, 1)  # [T, N, d]
    padded = rows.new_zeros(count * longest, *rows.shape[1:]).index_copy(0, samples.place, rows)
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
    """[B, H, T, d], causal; through a window of so many tokens, its own included."""
    length, grouped = query.shape[2], key.shape[1] != query.shape[1]
    band = None
    if window is not None and window < length:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        band = seen.triu(1 - window)
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
    # torch has no kernel that caps scores (Gemma 2): softcap * tanh(scores / softcap), before the
    # mask.
    if grouped:
        key, value = (
            side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value)
        )
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    seen = (
        band
        if band is not None
        else torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    )
    weights = scores.masked_fill(~seen, -math.inf).softmax(
        -1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return functional.dropout(weights.to(query.dtype), dropout) @ value
