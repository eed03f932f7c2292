"""What every section of the recipe shares: the base class, number types with bounds, and checks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pocl_ds.errors import did_you_mean

# Marks a field that changes how a run is executed (ranks, shards, logging), not what it computes.
RUNTIME_ONLY: dict[str, Any] = {"runtime_only": True}


MAX_SHARDS = 10_000  # tasks of one job array
MAX_SECONDS = 31_536_000  # a year; clocks and timers of libraries overflow far beyond it


class Section(BaseModel):
    """A section of the recipe: immutable, and an unknown field is an error."""

    # Defaults are validated too: 60 and 60.0 become one value, also in a recipe that was written
    # and read again.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True
    )


def _reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("write a number, not true or false")
    return value


def registered_name(kind: str, *registries: Collection[str]) -> Any:
    """A validator: the value is a name in one of the registries, which plugins extend."""

    def check(value: str) -> str:
        names = [name for registry in registries for name in registry]
        if value not in names:
            raise ValueError(f"there is no {kind} {value!r}: {did_you_mean(value, names)}")
        return value

    return AfterValidator(check)


# What to write, by the pattern that a text does not match.
PATTERN_REMEDIES: dict[str, str] = {}


def text_pattern(pattern: str, remedy: str, **constraints: Any) -> Any:
    """The field of a text that matches a pattern. remedy: what an error message says to write in
    place of one that does not.
    """
    PATTERN_REMEDIES[pattern] = remedy
    return Field(pattern=pattern, **constraints)


FileName: TypeAlias = Annotated[
    str,
    text_pattern(
        r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        "use letters, digits, dots, underscores and hyphens, and begin with a letter or a digit",
    ),
]
VariableName: TypeAlias = Annotated[
    str,
    text_pattern(
        r"^[A-Za-z_]\w*$",
        "the name of a variable has letters, digits and underscores, and does not begin with a "
        "digit",
    ),
]


def split_names(value: Any) -> Any:
    """Split `a, b` into a tuple of names; return any other value unchanged."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


# 64-bit integers, as in torch and numpy.
Int = Annotated[int, BeforeValidator(_reject_bool), Field(ge=-(1 << 63), lt=1 << 63)]
Float = Annotated[float, BeforeValidator(_reject_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Shards = Annotated[Positive, Field(le=MAX_SHARDS)]
WholeSeconds = Annotated[Positive, Field(le=MAX_SECONDS)]
Seconds = Annotated[PositiveFloat, Field(le=MAX_SECONDS)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
TopP = Annotated[Float, Field(gt=0, le=1)]


def _reject_shared_columns(fields: dict[str, str | None]) -> dict[str, str | None]:
    """A validator: no two fields of a mapping name one column."""
    fields_by_name: dict[str, str] = {}
    for field, name in fields.items():
        if name and (other := fields_by_name.setdefault(name, field)) != field:
            raise ValueError(
                f"{other} and {field} both name {name!r}: a column serves one field, so remove one "
                "of them"
            )
    return fields


RecordFormat: TypeAlias = Literal["auto", "alpaca", "prompt", "messages", "text"]
RecordField: TypeAlias = Literal[
    "id",
    "instruction",
    "input",
    "output",
    "prompt",
    "messages",
    "text",
    "system",
    "history",
    "tools",
    "reasoning",
    "label",
    "weight",
    "domain",
]
RecordFields: TypeAlias = Annotated[
    dict[RecordField, str | None], AfterValidator(_reject_shared_columns)
]
Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
ModelName: TypeAlias = Literal["teacher", "initial", "student", "baseline"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

# Descriptions of fields that several sections have.
DTYPE_AUTO = "`auto`: bfloat16 on GPUs, float32 on CPUs."
FORMAT_DESCRIPTION = (
    "Form of the records: `alpaca` (instruction, input, output), `prompt` (prompt, output), "
    "`messages` (a conversation), `text` (a text without a prompt), or `auto` to recognize each "
    "record by itself."
)
FIELDS_DESCRIPTION = (
    "Maps the fields of a record to their names or paths in the file, as in `{output: answer}` or "
    "`{output: answers.text.0}`; `null` ignores a field."
)
TOP_P_DESCRIPTION = (
    "Nucleus sampling: sample from the most probable tokens whose probabilities sum to `top_p`; "
    "1 samples from all tokens."
)
MAX_NEW_TOKENS_DESCRIPTION = "Maximum number of tokens to generate per response."
SHARDS_DESCRIPTION = (
    "Number of shards of this step. Each shard is saved when it is finished, can run as a separate "
    "SLURM job, and is not repeated after a restart."
)


def semantic_fields(section: BaseModel) -> dict[str, Any]:
    """The fields that change a result: all of the section without those marked runtime-only."""
    fields: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("runtime_only"):
            continue
        value = getattr(section, name)
        fields[name] = semantic_fields(value) if isinstance(value, BaseModel) else value
    return fields
