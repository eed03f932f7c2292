"""Attention over the samples of a packed row, written out with a mask over the whole row."""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_ds.models.attention_kernels import ScoreSettings


def visible_keys(lengths: tuple[int, ...], window: int | None) -> Tensor:
    """Which key each query attends to: [T, T] bool."""
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = torch.arange(len(sample))[:, None] - torch.arange(len(sample))
    visible = (sample[:, None] == sample) & (distance >= 0)
    return visible if window is None else visible & (distance < window)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], settings: ScoreSettings
) -> Tensor:
    """[1, T, H, d] of query [1, H, T, d] and key, value [1, G, T, d], in their dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    scale = query.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    if settings.soft_cap is not None:
        scores = settings.soft_cap * torch.tanh(scores / settings.soft_cap)
    visible = visible_keys(lengths, settings.window).to(query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value)


def random_sides(
    tokens: int, heads: int, groups: int, width: int, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a packed row in float64, as views like those that models make."""
    source = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, tokens, count, width, generator=source, dtype=torch.float64).transpose(1, 2)
        for count in (heads, groups, groups)
    )
    return query, key, value
