"""Depth pruning: makes a student from a model by removing layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from pocl_ds.compat.transformers_private import renumber_layers
from pocl_ds.errors import ModelError


def parse_layers(text: str) -> list[int]:
    """Ascending layer numbers, from 0, of `10-19` or `1,3,5-7`. Raises ModelError."""
    layers: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            start, stop = int(low), int(high if dash else low)
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
    """Remove the given layers from the model, in place, and return it.

    The other layers keep their weights and order. Their `layer_idx` (index in the key-value cache)
    and the configuration are updated. Raises ModelError if a layer does not exist, or none remain.
    """
    config = model.config
    depth = config.num_hidden_layers
    unknown = [layer for layer in layers if not 0 <= layer < depth]
    if unknown:
        raise ModelError(
            f"prune.drop_layers names layer {unknown[0]}, the model has layers 0 to {depth - 1}: "
            "choose among these"
        )
    remaining = [layer for layer in range(depth) if layer not in set(layers)]
    if not remaining:
        raise ModelError(
            f"prune.drop_layers names all {depth} layers of the model: leave at least one"
        )
    parent, name = _find_layer_list(model, depth)
    original = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(original[layer] for layer in remaining))
    renumber_layers(getattr(parent, name))
    prune_config(config, remaining)
    return model


def prune_config(config: Any, remaining: list[int]) -> None:
    """Reduce a configuration to the remaining layers, in place."""
    depth = config.num_hidden_layers
    for field in ("layer_types", "no_rope_layers", "mlp_layer_types"):  # one entry per layer
        entries = getattr(config, field, None)
        if isinstance(entries, list) and len(entries) == depth:
            setattr(config, field, [entries[layer] for layer in remaining])
    config.num_hidden_layers = len(remaining)


def _find_layer_list(model: Any, depth: int) -> tuple[Any, str]:
    """The module that owns the list of layers, and the name of the list in it."""
    for parent in model.base_model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name
    raise ModelError(
        f"no list of {depth} layers was found in a {model.config.model_type} model: it cannot be "
        "pruned"
    )
