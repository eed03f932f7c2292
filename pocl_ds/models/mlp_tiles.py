"""MLPs that run over a part of a row's tokens at a time.

An MLP computes each token alone, and its inner activations are several times as wide as the hidden
states. With tiles they exist for one tile only: the backward pass computes each tile again (as in
DeepSpeed's ALST, arXiv 2506.13996).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocl_ds.errors import ModelError


def dense_mlps(layers: list[Any], tokens: int) -> list[Any]:
    """The MLP of each decoder layer. tokens: of a tile, for the error.

    Raises ModelError for layers without a dense MLP, as those of OPT and of experts.
    """
    mlps = [getattr(layer, "mlp", None) for layer in layers]
    if any(mlp is None or hasattr(mlp, "experts") for mlp in mlps):
        raise ModelError(
            f"train.mlp_tile_tokens={tokens}: a {type(layers[0]).__name__} has no dense MLP of its "
            "own: set it to null"
        )
    return mlps


def tile_mlps(layers: list[Any], tokens: int) -> list[nn.Module]:
    """Tile the MLPs of decoder layers in place, and return them.

    tokens: of a tile, at most. Raises as `dense_mlps`.
    """
    mlps = dense_mlps(layers, tokens)
    for mlp in mlps:
        mlp.forward = functools.partial(_forward_tiles, mlp.forward, tokens)
    return mlps


def _forward_tiles(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    """An MLP's forward over [..., d], at most `tokens` tokens at a time."""
    rows = hidden.flatten(0, -2)
    if len(rows) <= tokens:
        return forward(hidden)
    tiles = rows.split(tokens)
    if torch.is_grad_enabled():
        outputs = [checkpoint(forward, tile, use_reentrant=False) for tile in tiles]
    else:
        outputs = [forward(tile) for tile in tiles]
    return torch.cat(outputs).view_as(hidden)
