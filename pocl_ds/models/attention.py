"""`per_sample` attention: causal within each sample, without a mask, for padded and packed rows.

transformers separates the samples of a packed row with a mask over the whole row. That costs n
times the work for n samples, and prevents the use of torch's fastest kernels. Padding on the right
needs no mask either, since no real token attends to its right. So padded rows only pass `is_causal`
to torch's kernels, and packed rows go to a kernel of variable length (see `attention_choice`).

Shapes: B rows, T positions, H heads, G heads of keys and values, d width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pocl_ds.errors import ModelError
from pocl_ds.models.attention_choice import ONE_BY_ONE, PADDED, AttentionCall, kernel_for
from pocl_ds.models.attention_kernels import PACKED_KERNELS, ScoreSettings
from pocl_ds.models.packed_samples import PackedSamples
from pocl_ds.models.sequence_shards import gather_tokens, scatter_tokens

PER_SAMPLE = "per_sample"
QUERY_BLOCK = 1024  # queries whose mask is made at once
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
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)


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
        samples: of a packed row (B = 1), of which the ranks of a sequence-parallel group may each
            have a part; None if rows are padded on the right.

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

    settings = ScoreSettings(scaling, softcap, sliding_window, dropout)
    if samples is None:
        return _attend(query, key, value, settings).contiguous(), None
    return _attend_packed(query, key, value, samples, settings), None


def check_attention(attention: str | None, config: Any) -> None:
    """Raise ModelError for a model family that was not tested without its mask."""
    if attention == PER_SAMPLE and config.model_type not in FAMILIES:
        raise ModelError(
            f"attn_implementation=per_sample is not tested with models of the family "
            f"{config.model_type!r}, which may need their mask: set their "
            "attn_implementation=eager, or sdpa if they have it"
        )


# torch.compile would compile again for other lengths.
@torch.compiler.disable
def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, settings: ScoreSettings
) -> Tensor:
    """Causal attention within each sample of a packed row, or of this rank's part of one:
    [1, T, H, d].
    """
    if query.shape[2] == samples.num_tokens:
        return _attend_row(query, key, value, samples, settings)
    return scatter_tokens(_attend_row(*gather_tokens(query, key, value), samples, settings))


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, settings: ScoreSettings
) -> Tensor:
    """Causal attention within each sample of a complete packed row: [1, T, H, d]."""
    call = AttentionCall(
        query.device.type, query.dtype, query.shape[-1], settings.soft_cap, settings.dropout
    )
    kernel = kernel_for(call)
    if kernel in PACKED_KERNELS:
        return PACKED_KERNELS[kernel](query, key, value, samples, settings)
    if len(samples.lengths) == 1:
        return _attend(query, key, value, settings).contiguous()
    if kernel == ONE_BY_ONE:
        pieces = [side.split(samples.lengths, dim=2) for side in (query, key, value)]
        outputs = [_attend(q, k, v, settings) for q, k, v in zip(*pieces, strict=True)]
        return torch.cat(outputs, dim=1)
    assert kernel == PADDED, kernel
    q, k, v = (_pad(side, samples) for side in (query, key, value))
    padded = _attend(q, k, v, settings)
    return padded.flatten(0, 1).index_select(0, samples.padded_positions)[None]


def _pad(side: Tensor, samples: PackedSamples) -> Tensor:
    """A packed row [1, N, T, d] as one row for each sample: [samples, N, longest, d]."""
    count, longest = len(samples.lengths), samples.longest
    rows = side[0].transpose(0, 1)  # [T, N, d]
    padded = rows.new_zeros(count * longest, *rows.shape[1:]).index_copy(
        0, samples.padded_positions, rows
    )
    return padded.unflatten(0, (count, longest)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, settings: ScoreSettings) -> Tensor:
    """Causal attention of each row: [B, T, H, d]. No tensor of it has T x T numbers."""
    length, window = query.shape[2], settings.window
    if window is not None and window >= length:
        window = None
    if settings.soft_cap is None and window is None:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=settings.dropout,
            scale=settings.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        ).transpose(1, 2)

    # One block of queries after another, with the keys that it attends to.
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        queries = torch.arange(start, stop, device=query.device)[:, None]
        keys = torch.arange(first, stop, device=query.device)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        sides = query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        if settings.soft_cap is None:
            output = functional.scaled_dot_product_attention(
                *sides,
                attn_mask=visible,
                dropout_p=settings.dropout,
                scale=settings.scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        elif length > QUERY_BLOCK:  # the backward pass computes the weights of a block again
            output = checkpoint(_attend_capped, *sides, visible, settings, use_reentrant=False)
        else:
            output = _attend_capped(*sides, visible, settings)
        blocks.append(output.transpose(1, 2))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, settings: ScoreSettings
) -> Tensor:
    """Attention with capped scores, as in Gemma 2, which torch's function does not have:
    [B, H, q, d]. visible: [q, k] bool, which key each query attends to.
    """
    assert settings.soft_cap is not None
    if key.shape[1] != query.shape[1]:
        copies = query.shape[1] // key.shape[1]
        key, value = (side.repeat_interleave(copies, dim=1) for side in (key, value))
    scale = query.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    scores = query @ key.transpose(2, 3) * scale
    scores = torch.tanh(scores / settings.soft_cap) * settings.soft_cap
    weights = scores.masked_fill(~visible, -math.inf).softmax(
        -1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return functional.dropout(weights.to(query.dtype), settings.dropout) @ value
