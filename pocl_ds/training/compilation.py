"""What a recipe changes in the decoder layers of student and teacher: MLPs over tiles of tokens
(`train.mlp_tile_tokens`), and torch.compile (`train.compile: layers`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from pocl_ds.compat.torch_private import raise_recompile_limit
from pocl_ds.config import TrainConfig
from pocl_ds.engines.deepspeed_engine import gather_as_one
from pocl_ds.models.cost import decoder_layers
from pocl_ds.models.mlp_tiles import tile_mlps

log = logging.getLogger("pocl_ds")

BACKEND = "inductor"
# Variants of a layer's code: student and teacher, kinds of layers, with and without gradients,
# padded and packed rows.
MAX_VARIANTS = 64


def prepare_layers(model: Any, train: TrainConfig) -> None:
    """Tile the MLPs and compile the layers of a model in place, if the recipe asks for it. Call it
    before an engine wraps the model.

    Raises ModelError for a family whose MLPs cannot be tiled.
    """
    if train.mlp_tile_tokens is not None:
        for mlp in tile_mlps(decoder_layers(model), train.mlp_tile_tokens):
            if train.engine == "deepspeed":  # gather an MLP as one: ranks may differ in their tiles
                gather_as_one(mlp)
        log.info(
            "the MLPs of the %s run over %d tokens at a time",
            model.config.model_type,
            train.mlp_tile_tokens,
        )
    compile_layers(model, train)


def compile_layers(model: Any, train: TrainConfig) -> None:
    """Compile the decoder layers of a model in place, if the recipe asks for it.

    Equal layers share their compiled code. Lengths of samples and rows may change without another
    compilation. Only `forward` is compiled, so that the hooks of ZeRO-3 and of activation
    checkpointing, which run around it, stay outside; therefore ZeRO-3 gathers a layer as one.
    """
    if train.compile == "none":
        return
    raise_recompile_limit(MAX_VARIANTS)
    layers: list[Any] = decoder_layers(model)
    for layer in layers:
        if train.engine == "deepspeed":
            gather_as_one(layer)
        layer.forward = torch.compile(layer.forward, backend=BACKEND, dynamic=True)
    log.info("torch.compile for the %d layers of the %s", len(layers), model.config.model_type)
