"""Section `curriculum`: subsets and stages."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pocl_ds.config.base import (
    RUNTIME_ONLY,
    Float,
    Fraction,
    Positive,
    Section,
    Shards,
    registered_name,
)
from pocl_ds.config.registry import DIFFICULTIES, SAMPLE_WEIGHT_SCORES, SAMPLE_WEIGHTS
from pocl_ds.errors import did_you_mean


def _check_epochs(value: Any) -> Any:
    """One number for all stages, or one for each."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(type(number) is int and 1 <= number < 1 << 31 for number in numbers):
        raise ValueError(
            "write one number of epochs, at least 1, or one for each stage, as in 8 or "
            "[10, 8, 6, 6]"
        )
    return tuple(value) if isinstance(value, list) else value


_WEIGHT_OPTIONS = "; ".join(
    f"`{name}`: {', '.join(f'{option}={default:g}' for option, default in options.items())}"
    for name, options in SAMPLE_WEIGHTS.items()
)
# Options that are a share or a place, and so lie between 0 and 1.
_UNIT_INTERVAL = ("easiest", "hardest", "share", "hard_share")


class _ScoreReader(Section):
    """A section that names a function of the samples' scores."""

    @property
    @abstractmethod
    def scores(self) -> tuple[str, ...] | None:
        """The scores that the function reads; None if it may read any, as a plugin's."""

    def reads(self, *names: str) -> bool:
        """Whether the function is known to read one of these scores."""
        return self.scores is not None and not set(names).isdisjoint(self.scores)

    def may_read(self, *names: str) -> bool:
        """The same, and true for a plugin's function."""
        return self.scores is None or self.reads(*names)


class SampleWeightsConfig(_ScoreReader):
    """A weight in the loss for each sample (docs/method.md, eq. 28)."""

    name: str = Field(
        description="Rule: `pass_rate` (p^alpha (1 - p)^beta of p = ROUGE-L, as in PACED), `band` "
        "(1 from the place `easiest` to the place `hardest` of the ranking, else 0), `stratified` "
        "(1 for the hardest samples and for evenly spaced easier ones, else 0), `loss` (the "
        "divergence from the teacher, measured when the stage begins, to a power). A weight of 0 "
        "leaves a sample out. Plugins can register more.",
    )
    options: dict[str, Float] = Field(
        default_factory=dict, description=f"Options of the rule, with defaults. {_WEIGHT_OPTIONS}."
    )

    @property
    def scores(self) -> tuple[str, ...] | None:
        """The scores that the rule reads; None if it may read any."""
        return SAMPLE_WEIGHT_SCORES.get(self.name)

    @model_validator(mode="after")
    def _check_rule(self) -> SampleWeightsConfig:
        if self.name not in SAMPLE_WEIGHTS:
            raise ValueError(
                f"there is no rule {self.name!r} for sample weights: "
                f"{did_you_mean(self.name, SAMPLE_WEIGHTS)}"
            )
        for option, value in self.options.items():
            if option not in SAMPLE_WEIGHTS[self.name]:
                known = ", ".join(SAMPLE_WEIGHTS[self.name]) or "no options"
                raise ValueError(f"{self.name} has no option {option!r}: it has {known}")
            if value < 0 or (option in _UNIT_INTERVAL and value > 1):
                bounds = "between 0 and 1" if option in _UNIT_INTERVAL else "at least 0"
                raise ValueError(f"{self.name}: {option}={value:g} must be {bounds}")
        complete = {**SAMPLE_WEIGHTS[self.name], **self.options}
        if self.name == "band" and complete["easiest"] >= complete["hardest"]:
            raise ValueError(
                f"band: easiest={complete['easiest']:g} must be below "
                f"hardest={complete['hardest']:g}, or no sample is left"
            )
        if self.name == "stratified" and complete["share"] == 0:
            raise ValueError("stratified: share=0 leaves no sample: give a share above 0")
        return self


class RescoringConfig(_ScoreReader):
    """The student scores and ranks the samples again when a stage begins."""

    difficulty: Annotated[str, registered_name("measure of difficulty", DIFFICULTIES)] = Field(
        "cross_entropy",
        description="What the samples are ranked by, small values first: the student's "
        "`cross_entropy` of the reference, `kd_loss` (its divergence from the teacher), "
        "`loss_ratio` (its cross-entropy divided by the teacher's), or `fusion` (reciprocal rank "
        "fusion of the first ROUGE-L and the new cross-entropy). Plugins can register more.",
    )
    reverse: bool = Field(False, description="Reverse the new ranking: hardest sample first.")
    share: Annotated[Float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Share of the samples that are scored again at each stage, chosen by seed, "
        "stage and sample id. The others keep their last scores.",
    )
    from_stage: Positive = Field(
        2,
        description="First stage, counted from 1, that begins with new scores. 1 scores before "
        "any training, in place of the difficulty ranking.",
    )
    shards: Shards = Field(
        8,
        description="Parts of the samples; an interrupted rescoring repeats only unfinished ones.",
        json_schema_extra=RUNTIME_ONLY,
    )

    @property
    def scores(self) -> tuple[str, ...] | None:
        """The scores that the measure reads; None if it may read any."""
        return DIFFICULTIES[self.difficulty]

    def samples_to_score(self, samples: int, stage: int) -> int:
        """How many of all samples the student scores when a stage, counted from 0, begins."""
        if stage + 1 < self.from_stage:
            return 0
        first = stage + 1 == self.from_stage
        return samples if first else max(1, round(self.share * samples))


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
    scheduler: Literal["baby_step", "one_pass", "all_samples"] = Field(
        "baby_step",
        description="`baby_step`: each stage adds the next subset to all earlier ones. "
        "`one_pass`: each stage trains on its own subset alone. `all_samples`: each stage trains "
        "on all samples, for curricula of weights, teachers or temperatures.",
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

    sample_weights: SampleWeightsConfig | None = Field(
        None, description="Weight of each sample in the loss; `null` weights all samples alike."
    )
    rescoring: RescoringConfig | None = Field(
        None,
        description="Rank the samples again with the current student when a stage begins; `null` "
        "keeps the difficulty ranking for the whole run.",
    )

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: tuple[float, float]) -> tuple[float, float]:
        if min(value) <= 0:
            raise ValueError("a temperature must be greater than 0, as in [1.0, 2.0]")
        return value

    @model_validator(mode="after")
    def _check_rescoring(self) -> CurriculumConfig:
        if self.rescoring and self.rescoring.from_stage > self.num_subsets:
            raise ValueError(
                f"rescoring.from_stage={self.rescoring.from_stage} is after the last of "
                f"num_subsets={self.num_subsets} stages: lower it, or remove rescoring"
            )
        return self

    @property
    def plan_has_weights(self) -> bool:
        """Whether the plan weighs the samples, unless the student first scores them again."""
        rescoring = self.rescoring
        return self.sample_weights is not None and not (rescoring and rescoring.from_stage == 1)

    @model_validator(mode="after")
    def _check_number_of_epochs(self) -> CurriculumConfig:
        epochs = self.epochs_per_stage
        if isinstance(epochs, tuple) and len(epochs) != self.num_subsets:
            raise ValueError(
                f"epochs_per_stage has {len(epochs)} numbers and num_subsets={self.num_subsets}: "
                "write one number for each stage, or one for all"
            )
        return self
