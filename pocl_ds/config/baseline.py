"""Section `baseline`: plain distillation to compare the curriculum with."""

from __future__ import annotations

from pydantic import Field

from pocl_ds.config.base import RUNTIME_ONLY, Fraction, PositiveFloat, Section


class BaselineConfig(Section):
    """Plain distillation with as many sample visits as the curriculum, at one temperature and one
    SFT ratio.
    """

    enabled: bool = Field(
        False,
        description="Train and evaluate the baseline as well.",
        json_schema_extra=RUNTIME_ONLY,
    )
    temperature: PositiveFloat = Field(1.0, description="Distillation temperature of the baseline.")
    sft_ratio: Fraction = Field(
        0.3,
        description="Weight of the cross-entropy with the reference in the baseline's loss; the "
        "divergence has the remaining weight.",
    )
