"""Depth pruning: a student made from a model by leaving whole layers out."""

from __future__ import annotations

from typing import Any

from torch import nn

from pocl_ds.errors import ModelError


def parse_layers(text: str) -> list[int]:
    """Layer numbers, from 0 and ascending, of `10-19` or `1,3,5-7`. Raises ModelError."""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            start, stop = int(first), int(last if dash else first)
        except ValueError:
            raise ModelError(
                f"layers {text!r}: write numbers and ranges, as in 10-19 or 1,3,5-7"
            ) from None
        if stop < start:
            raise ModelError(
                f"layers {text!r}: the range {part.strip()} runs backwards, write {stop}-{start}"
            )
        layers.update(range(start, stop + 1))
    return sorted(layers)


def prune_layers(model: Any, layers: list[int]) -> Any:
    """Leave the given layers out of the model, in place, and return it.

    The others keep their weights and their order; their `layer_idx` (place in the key-value cache)
    is renumbered and the configuration tells of the new depth. Raises ModelError where a layer does
    not exist or none would be left.
    """
    config = model.config
    depth = config.num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ModelError(
            f"prune.drop_layers names layer {outside[0]}, the model has layers 0 to {depth - 1}: "
            f"choose among these"
        )
    kept = [layer for layer in range(depth) if layer not in set(layers)]
    if not kept:
        raise ModelError(
            f"prune.drop_layers names all {depth} layers of the model: leave at least one"
        )
    parent, name = _layer_list(model, depth)
    old = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(old[layer] for layer in kept))
    for index, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    prune_config(config, kept)
    return model


def prune_config(config: Any, kept: list[int]) -> None:
    """A configuration of the layers that are kept, in place."""
    depth = config.num_hidden_layers
    for field in (
        "layer_types",
        "no_rope_layers",
        "mlp_layer_types",
    ):  # one entry a layer, in newer families
        entries = getattr(config, field, None)
        if isinstance(entries, list) and len(entries) == depth:
            setattr(config, field, [entries[layer] for layer in kept])
    config.num_hidden_layers = len(kept)


def _layer_list(model: Any, depth: int) -> tuple[Any, str]:
    """The module that owns the list of layers, and the list's name there."""
    for parent in model.base_model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name
    raise ModelError(
        f"no list of {depth} layers was found in a {model.config.model_type} model: it cannot be "
        f"pruned"
    )
