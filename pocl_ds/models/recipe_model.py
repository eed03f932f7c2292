"""Load a model as a recipe describes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from pocl_ds.config import ModelSource, StudentConfig, TeacherConfig
from pocl_ds.config.ds_config import ZeroSizes
from pocl_ds.models.load import load_model, load_model_config
from pocl_ds.runtime import distributed

# (path, section of the recipe, dropout) -> model. `pocl bench gpu` makes random weights instead.
ModelLoader: TypeAlias = Callable[[str, StudentConfig | TeacherConfig, float | None], Any]


def load_recipe_model(
    path: str, config: StudentConfig | TeacherConfig, dropout: float | None = None
) -> Any:
    """Load the model in a folder with the dtype, attention and quantization of the recipe.

    dropout: as `load_model` takes it. Raises ModelError.
    """
    return load_model(
        path,
        dtype=config.dtype,
        attention=config.attn_implementation,
        dropout=dropout,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        quantization=config.quantization if isinstance(config, TeacherConfig) else "none",
    )


def read_model_config(path: str, source: ModelSource) -> Any:
    """The configuration of the model in a folder."""
    return load_model_config(
        path, trust_remote_code=source.trust_remote_code, revision=source.revision
    )


def zero_sizes(path: str, source: ModelSource) -> ZeroSizes:
    """What the buffers of ZeRO-3 follow from, for the model in a folder."""
    config = read_model_config(path, source)
    hidden_size = int(config.get_text_config(decoder=True).hidden_size)
    return ZeroSizes(hidden_size, distributed.ranks_per_node())
