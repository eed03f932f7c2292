"""Section `loss`: the divergence between teacher and student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pocl_ds.config.base import RUNTIME_ONLY, Float, NonNegativeFloat, Section
from pocl_ds.config.registry import LOSSES, TOKEN_RULES
from pocl_ds.errors import did_you_mean


def _options_by_name(registry: Mapping[str, Mapping[str, float | bool]]) -> str:
    return "; ".join(
        f"`{name}`: {', '.join(options)}" for name, options in registry.items() if options
    )


def _check_names(
    kind: str,
    name: str,
    options: Mapping[str, float | bool],
    registry: Mapping[str, Mapping[str, float | bool]],
) -> None:
    """Raise ValueError for a name or an option that is not in the registry."""
    if name not in registry:
        raise ValueError(f"there is no {kind} {name!r}: {did_you_mean(name, registry)}")
    for option in options:
        if option not in registry[name]:
            known = ", ".join(registry[name])
            remedy = f"it has {known}" if known else "it has no options"
            raise ValueError(f"{name} has no option {option!r}: {remedy}")


Writer = Literal["data", "student", "teacher"]  # who wrote the responses of an optimizer step


class DivergenceConfig(Section):
    """A loss by name, with its options."""

    name: str = Field(
        "fkl",
        description=f"Loss: {', '.join(f'`{name}`' for name in LOSSES)}. `sft` is the "
        "cross-entropy with the reference, without a teacher; `uld` and `alm` distil between "
        "different tokenizers. Plugins can register more.",
    )
    options: dict[str, float | bool] = Field(
        default_factory=dict, description=f"Options of the divergence. {_options_by_name(LOSSES)}."
    )

    @model_validator(mode="after")
    def _check_name_and_options(self) -> DivergenceConfig:
        _check_names("loss", self.name, self.options, LOSSES)
        return self


class TokenRuleConfig(Section):
    """A rule for the temperature and the weight of each token, with its options (docs/method.md,
    eq. 29 to 31).
    """

    name: str = Field(
        description=f"Rule: {', '.join(f'`{name}`' for name in TOKEN_RULES)}. Plugins can register "
        "more."
    )
    options: dict[str, float | bool] = Field(
        default_factory=dict, description=f"Options of the rule. {_options_by_name(TOKEN_RULES)}."
    )

    @model_validator(mode="after")
    def _check_name_and_options(self) -> TokenRuleConfig:
        _check_names("token rule", self.name, self.options, TOKEN_RULES)
        return self


class LossConfig(DivergenceConfig):
    """The divergence between teacher and student (docs/method.md, eq. 9 to 21)."""

    scale_by_temperature_squared: bool = Field(
        True,
        description="Multiply the divergence by the squared temperature, so that its gradient "
        "keeps its size at every temperature.",
    )
    by_writer: dict[Literal["student", "teacher"], DivergenceConfig] = Field(
        default_factory=dict,
        description="Other divergences, with `name` and `options`, for the optimizer steps whose "
        "responses the `student` or the `teacher` wrote, as in DistiLLM-2 (arXiv 2503.07067). "
        "Steps of a writer that is not named, and of the data, use `loss.name`.",
    )
    token_rule: TokenRuleConfig | None = Field(
        None,
        description="Gives each token its own factor of the temperature, and of the divergence, by "
        "what teacher and student predict for it. `null`: all tokens are alike. Validation has no "
        "rule.",
    )
    thought_weight: NonNegativeFloat = Field(
        1.0,
        description="Weight of a token of a thought, which ends with `</think>` or another closing "
        "tag, relative to a token of the answer after it. The loss is divided by the sum of the "
        "weights: 0 trains on answers alone.",
    )
    fused: bool = Field(
        True,
        description="Compute logits and loss together, in chunks of response tokens, without "
        "storing all logits. `false` uses the models' complete logits: for model families whose "
        "output head is not supported.",
        json_schema_extra=RUNTIME_ONLY,
    )
    chunk_memory_mb: Annotated[Float, Field(ge=0.0625)] = Field(
        512,
        description="Memory for the logits of one chunk, in MiB, with `fused: true`.",
        json_schema_extra=RUNTIME_ONLY,
    )

    @property
    def chunk_bytes(self) -> int:
        """Memory for one chunk of logits, in bytes."""
        return int(self.chunk_memory_mb * (1 << 20))

    def of_writer(self, writer: Writer) -> DivergenceConfig:
        """The divergence for responses of a writer."""
        return self if writer == "data" else self.by_writer.get(writer, self)
