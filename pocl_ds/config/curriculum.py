"""Section `curriculum`: subsets and stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pocl_ds.config.base import Float, Fraction, Positive, Section


def _check_epochs(value: Any) -> Any:
    """One number for all stages, or one for each."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(type(number) is int and 1 <= number < 1 << 31 for number in numbers):
        raise ValueError(
            "write one number of epochs, at least 1, or one for each stage, as in 8 or "
            "[10, 8, 6, 6]"
        )
    return tuple(value) if isinstance(value, list) else value


class CurriculumConfig(Section):
    """Subsets of the difficulty ranking, and the stages that train on them (docs/method.md,
    eq. 4 to 7).
    """

    num_subsets: Positive = Field(
        4,
        description="Number of equal parts into which the difficulty ranking is cut; also the "
        "number of stages. 1 is plain distillation.",
    )
    epochs_per_stage: Annotated[int | tuple[int, ...], BeforeValidator(_check_epochs)] = Field(
        8, description="Epochs of every stage, or a list with one number per stage."
    )
    scheduler: Literal["baby_step", "one_pass"] = Field(
        "baby_step",
        description="`baby_step`: each stage adds the next subset to all earlier ones. "
        "`one_pass`: each stage trains on its own subset alone.",
    )
    temperature: tuple[Float, Float] = Field(
        (1.0, 2.0),
        description="Distillation temperature of the first and of the last stage, linear in "
        "between: both models' logits are divided by it.",
    )
    sft_ratio: tuple[Fraction, Fraction] = Field(
        (0.3, 0.0),
        description="Weight of the cross-entropy with the reference in the loss, in the first and "
        "the last stage, linear in between. The divergence has the remaining weight.",
    )
    drop_last: bool = Field(
        True,
        description="Drop the last, incomplete batch of each epoch; `false` fills it with samples "
        "from the beginning of the epoch.",
    )

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: tuple[float, float]) -> tuple[float, float]:
        if min(value) <= 0:
            raise ValueError("a temperature must be greater than 0, as in [1.0, 2.0]")
        return value

    @model_validator(mode="after")
    def _check_number_of_epochs(self) -> CurriculumConfig:
        epochs = self.epochs_per_stage
        if isinstance(epochs, tuple) and len(epochs) != self.num_subsets:
            raise ValueError(
                f"epochs_per_stage has {len(epochs)} numbers and num_subsets={self.num_subsets}: "
                "write one number for each stage, or one for all"
            )
        return self
