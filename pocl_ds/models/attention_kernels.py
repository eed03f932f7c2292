"""Attention over the samples of a packed row by kernels of variable length.

Shapes: T tokens of the row, H heads, G heads of keys and values, d width of a head.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from pocl_ds.errors import ModelError, compile_fault
from pocl_ds.models.attention_choice import FLASH_ATTN, FLEX, TORCH_VARLEN, parameters_of
from pocl_ds.models.packed_samples import PackedSamples


@dataclass(frozen=True)
class ScoreSettings:
    """How attention makes weights of queries and keys."""

    scale: float | None = None  # of the scores; None is d ** -0.5
    soft_cap: float | None = None  # scores become soft_cap * tanh(scores / soft_cap)
    window: int | None = None  # tokens that a token attends to, itself included; None is all
    dropout: float = 0.0  # probability, of the weights


def flash_attn(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, settings: ScoreSettings
) -> Tensor:
    """Causal attention within each sample by the package flash-attn: [1, T, H, d].

    query: [1, H, T, d]; key, value: [1, G, T, d].
    """
    function: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    output: Tensor = function(
        *map(_tokens_first, (query, key, value)),
        samples.cu_seqlens,
        samples.cu_seqlens,
        samples.longest,
        samples.longest,
        dropout_p=settings.dropout,
        softmax_scale=settings.scale,
        causal=True,
        window_size=_window_size(settings, samples),
        softcap=settings.soft_cap or 0.0,
    )
    return output[None]


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, settings: ScoreSettings
) -> Tensor:
    """The same by torch's variable-length kernel, which has neither soft cap nor dropout."""
    function: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # torch 2.11 takes grouped keys and values without being told.
    grouped = {"enable_gqa": True} if _varlen_names_groups() else {}
    output: Tensor = function(
        *map(_tokens_first, (query, key, value)),
        samples.cu_seqlens,
        samples.cu_seqlens,
        samples.longest,
        samples.longest,
        scale=settings.scale,
        window_size=_window_size(settings, samples),
        **grouped,
    )
    return output[None]


def flex(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, settings: ScoreSettings
) -> Tensor:
    """The same by FlexAttention, which has no dropout.

    Raises ModelError if it cannot be compiled.
    """
    window = settings.window
    if window is not None and window >= samples.longest:
        window = None
    cap = settings.soft_cap
    score_mod = None if cap is None else _soft_cap(cap, query)
    try:
        output: Tensor = _compiled_flex_attention()(
            query,
            key,
            value,
            score_mod=score_mod,
            block_mask=samples.block_mask(window),
            scale=settings.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    except Exception as error:
        if (fault := compile_fault(error)) is None:
            raise
        raise ModelError(
            f"FlexAttention cannot be compiled on this machine ({fault}): set the model's "
            "attn_implementation=eager"
        ) from error
    return output.transpose(1, 2)


# The kernels of packed rows by their names in `attention_choice`.
PACKED_KERNELS: dict[
    str, Callable[[Tensor, Tensor, Tensor, PackedSamples, ScoreSettings], Tensor]
] = {FLASH_ATTN: flash_attn, TORCH_VARLEN: torch_varlen, FLEX: flex}


def _tokens_first(side: Tensor) -> Tensor:
    """[1, H, T, d] as [T, H, d], a view."""
    return side[0].transpose(0, 1)


def _window_size(settings: ScoreSettings, samples: PackedSamples) -> tuple[int, int]:
    """The tokens before and after a token that it attends to; -1 is all."""
    window = settings.window
    return (-1 if window is None or window >= samples.longest else window - 1, 0)


@functools.cache
def _varlen_names_groups() -> bool:
    return "enable_gqa" in parameters_of("torch.nn.attention.varlen", "varlen_attn")


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _soft_cap(value: float, query: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's score function that caps scores."""
    # A tensor, since torch.compile cannot lower a Python number that may change.
    caps = torch.full((query.shape[1],), value, device=query.device)

    def cap_score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return caps[head] * torch.tanh(score / caps[head])

    return cap_score
