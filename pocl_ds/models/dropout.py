"""Dropout and layer dropping in the configuration of a model."""

from __future__ import annotations

from typing import Any

from pocl_ds.errors import ModelError

LAYER_DROPPING = "layerdrop"  # how names of a configuration end: `layerdrop`, `decoder_layerdrop`


def set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout rate of a configuration (`attention_dropout`, `resid_pdrop`, ...), in
    place, and turn layer dropping off.
    """
    for section in (config, config.get_text_config(decoder=True)):
        for name in _numbers(section):
            if name.endswith(("dropout", "pdrop")):
                setattr(section, name, dropout)
            elif name.endswith(LAYER_DROPPING):
                setattr(section, name, 0.0)


def check_layer_dropping(path: str, config: Any, dropout: float | None) -> None:
    """Raise ModelError if a student would skip whole layers at random in training: ranks that skip
    different ones wait for each other under ZeRO-3.

    dropout: student.dropout; a number turns layer dropping off.
    """
    if dropout is not None:
        return
    for section in (config, config.get_text_config(decoder=True)):
        for name, value in _numbers(section).items():
            if value and name.endswith(LAYER_DROPPING):
                raise ModelError(
                    f"{path} has {name}={value:g} in its config.json, so training would skip whole "
                    "layers at random, different ones on each rank: set student.dropout (0 for "
                    "none), which turns layer dropping off"
                )


def _numbers(config: Any) -> dict[str, float]:
    """The fields of a configuration that are numbers."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
