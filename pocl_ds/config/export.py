"""Section `export`: the weights of the exported student."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pocl_ds.config.base import Section


class ExportConfig(Section):
    """The weights of the exported student."""

    dtype: Literal["auto", "float32"] = Field(
        "auto",
        description="Data type of the trained weights in `train/final` and in the export: `auto` "
        "keeps that of the forward pass (`student.dtype`); `float32` writes the optimizer's master "
        "weights, which are not rounded to it.",
    )
