"""Section `data`: where the instruction data comes from, and how it is split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pocl_ds.config.base import (
    FIELDS_DESCRIPTION,
    FORMAT_DESCRIPTION,
    Fraction,
    Positive,
    RecordFields,
    RecordFormat,
    Section,
)


class DocumentationConfig(Section):
    """The corpus of `data.source: documentation`: questions about Python functions, answered by the
    docstrings of installed packages.
    """

    packages: tuple[str, ...] = Field(
        ("stdlib", "numpy", "torch"),
        description="Packages to read docstrings from: `stdlib` or names of installed packages.",
    )
    min_words: Positive = Field(4, description="Shortest response to include, in words.")
    max_words: Positive = Field(60, description="Longest response to include, in words.")


class DataConfig(Section):
    """Where the instruction data comes from, and how it is split."""

    source: str = Field(
        description="Training data: a .jsonl, .json or .parquet file, the name of a Hugging Face "
        "dataset, or `documentation` for the built-in corpus of docstrings."
    )
    hub_subset: str | None = Field(
        None, description="Configuration name (subset) of a Hugging Face dataset."
    )
    hub_split: str = Field("train", description="Split of a Hugging Face dataset.")
    hub_revision: str | None = Field(
        None,
        description="Revision of a Hugging Face dataset: a branch, tag or commit. A commit makes "
        "the run reproducible.",
    )
    format: RecordFormat = Field("auto", description=FORMAT_DESCRIPTION)
    fields: RecordFields = Field(default_factory=dict, description=FIELDS_DESCRIPTION)
    on_invalid: Literal["error", "skip"] = Field(
        "error",
        description="What to do with records that have no usable response, such as an empty "
        "output: stop with an error, or skip and count them.",
    )
    validation: str | None = Field(
        None,
        description="File with validation samples; `null` holds out a fraction of `source`.",
    )
    test: str | None = Field(
        None, description="File with test samples; `null` holds out a fraction of `source`."
    )
    validation_fraction: Fraction = Field(
        0.05,
        description="Fraction of `source` held out for validation, chosen by a hash of the prompt "
        "so that equal prompts stay in one split.",
    )
    test_fraction: Fraction = Field(
        0.05, description="Fraction of `source` held out for testing, chosen by the same hash."
    )
    max_train_samples: Positive | None = Field(
        None, description="Maximum number of training samples, chosen by hash; `null` for all."
    )
    max_validation_samples: Positive | None = Field(
        None, description="Maximum number of validation samples, chosen by hash; `null` for all."
    )
    max_test_samples: Positive | None = Field(
        None, description="Maximum number of test samples, chosen by hash; `null` for all."
    )
    documentation: DocumentationConfig = DocumentationConfig()

    @model_validator(mode="after")
    def _check_fractions(self) -> DataConfig:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction + test_fraction leave no training samples: make their sum "
                "less than 1"
            )
        return self
