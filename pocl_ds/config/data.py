"""Section `data`: where the instruction data comes from, and how it is split."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pocl_ds.config.base import (
    FIELDS_DESCRIPTION,
    FORMAT_DESCRIPTION,
    RUNTIME_ONLY,
    Float,
    Fraction,
    Positive,
    RecordFields,
    RecordFormat,
    Role,
    Section,
    text_pattern,
)

# Endings of data files, and of compressed ones (`x.jsonl.gz`); upper case is the same.
TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
DATA_ENDINGS = (*TEXT_ENDINGS, ".parquet", ".arrow")
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
HeldOutSplit: TypeAlias = Literal["validation", "test"]
HELD_OUT_SPLITS: tuple[HeldOutSplit, ...] = ("validation", "test")
# Sources that need no file.
DOCUMENTATION, STORIES, TASKS = "documentation", "stories", "tasks"
BUILT_IN_SOURCES = (DOCUMENTATION, STORIES, TASKS)
HUB_SPLIT_DESCRIPTION = (
    "Split of a Hugging Face dataset, or of a local file or folder that holds several splits."
)


def _check_source(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) and name.strip() for name in names)
    ):
        raise ValueError("name a file, a folder, a pattern, a Hub dataset, or a list of files")
    return value


def _check_weight(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(
            "a weight is above 0 and at most 1, since no sample is used twice: lower the weights "
            "of the other sources instead"
        )
    return value


# A validator before the union, so that a wrong value gives one sentence.
Source: TypeAlias = Annotated[str | tuple[str, ...], BeforeValidator(_check_source)]
Weight: TypeAlias = Annotated[Float, AfterValidator(_check_weight)]


class SourceConfig(Section):
    """One source of a mixture (`data.sources`)."""

    source: Source = Field(description="Data of this source, as in `data.source`.")
    name: (
        Annotated[str, text_pattern(r"^\S(.*\S)?$", "write a name without spaces around it")] | None
    ) = Field(
        None,
        description="Name of the source in logs and reports; `null` for the name of the file "
        "without its ending, or of the Hugging Face dataset.",
    )
    weight: Weight = Field(
        1.0,
        description="Fraction of this source's samples that is used, above 0 and at most 1: of n "
        "samples, round(weight x n), chosen by a hash of their ids. Sources therefore contribute "
        "in proportion to weight x size.",
    )
    max_samples: Positive | None = Field(
        None,
        description="Maximum number of samples of this source, applied after `weight` and chosen "
        "by the same hash; `null` for no maximum.",
    )
    format: RecordFormat = Field("auto", description=FORMAT_DESCRIPTION)
    fields: RecordFields = Field(default_factory=dict, description=FIELDS_DESCRIPTION)
    hub_subset: str | None = Field(
        None, description="Configuration name (subset) of a Hugging Face dataset."
    )
    hub_split: str = Field("train", description=HUB_SPLIT_DESCRIPTION)
    hub_revision: str | None = Field(
        None, description="Revision of a Hugging Face dataset: a branch, tag or commit."
    )

    @property
    def label(self) -> str:
        """The source's name, or the one that follows from its file, folder or Hub dataset."""
        if self.name is not None:
            return self.name
        source = self.source if isinstance(self.source, str) else self.source[0]
        path = PurePath(source)
        endings = (*DATA_ENDINGS, *COMPRESSED_ENDINGS)
        if not source.startswith(("/", ".", "~")) and path.suffix.lower() not in endings:
            return source
        while path.suffix.lower() in endings:
            path = path.with_suffix("")
        return re.sub(r"[-_.]*[*?\[].*", "", path.name) or path.parent.name or source


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


TaskFamily: TypeAlias = Literal[
    "sum", "largest", "sort", "reverse", "position", "select", "replace", "table", "program"
]


class TasksConfig(Section):
    """The corpus of `data.source: tasks`: small instruction tasks of graded difficulty."""

    families: tuple[TaskFamily, ...] = Field(
        get_args(TaskFamily), min_length=1, description="Families of tasks, which take turns."
    )
    count: Positive = Field(
        24_000,
        description="Number of tasks, all with different prompts. A larger corpus begins with the "
        "tasks of a smaller one, and a prompt is in the same split of every corpus. Of the lower "
        "levels there are few different prompts, so that a large corpus has mostly high levels.",
    )


class DataConfig(Section):
    """Where the instruction data comes from, and how it is split."""

    source: Source | None = Field(
        None,
        description="Training data: a file (.jsonl, .json, .csv, .tsv, .parquet or .arrow, text "
        "files also compressed as .gz, .bz2, .xz or .zst), a list of files, a pattern such as "
        "`data/*.jsonl`, a folder of files or one of `save_to_disk`, the name of a Hugging Face "
        "dataset, or a built-in corpus: `documentation` of docstrings, `stories` of short stories "
        "with a question, `tasks` of small tasks of graded difficulty.",
    )
    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="A mixture of several sources, each with its own weight, limit and fields, "
        "instead of `source`.",
    )
    hub_subset: str | None = Field(
        None, description="Configuration name (subset) of a Hugging Face dataset."
    )
    hub_split: str = Field("train", description=HUB_SPLIT_DESCRIPTION)
    hub_validation_split: str | None = Field(
        None,
        description="Split with the validation samples, of `validation` if that is set, else of "
        "`source`; `null` reads `hub_split` of `validation`.",
    )
    hub_test_split: str | None = Field(
        None,
        description="Split with the test samples, of `test` if that is set, else of `source`; "
        "`null` reads `hub_split` of `test`.",
    )
    streaming: bool = Field(
        False,
        description="Read a Hugging Face dataset as it downloads, without a copy on disk; files "
        "are always read in pieces.",
        json_schema_extra=RUNTIME_ONLY,
    )
    hub_revision: str | None = Field(
        None,
        description="Revision of a Hugging Face dataset: a branch, tag or commit. A commit makes "
        "the run reproducible.",
    )
    format: RecordFormat = Field("auto", description=FORMAT_DESCRIPTION)
    fields: RecordFields = Field(default_factory=dict, description=FIELDS_DESCRIPTION)
    roles: dict[str, Role] = Field(
        default_factory=dict,
        description="Maps other names of roles in conversations to `system`, `developer`, `user`, "
        "`assistant` or `tool`, as in `{narrator: system}`.",
    )
    train_on: Literal["all_turns", "last_turn"] = Field(
        "all_turns",
        description="Turns of the assistant that train: all of a conversation, or the last one.",
    )
    on_invalid: Literal["error", "skip"] = Field(
        "error",
        description="What to do with records that cannot be used, such as one with an empty "
        "output: stop with an error, or skip and count them by reason.",
    )
    duplicate_ids: Literal["error", "suffix"] = Field(
        "error",
        description="What to do with an id that occurred before: an error, or a suffix (`id-1`, "
        "`id-2`). `fields.id: null` ignores the ids of the records.",
    )
    special_tokens_in_text: Literal["allow", "escape", "drop"] = Field(
        "allow",
        description="What to do with texts that contain a special token of the tokenizer, such as "
        "`</s>` or `<|im_end|>`: `allow` reads it as the token, `escape` as ordinary characters, "
        "`drop` leaves the sample out. The number of such samples is logged.",
    )
    validation: Source | None = Field(
        None,
        description="Validation data, in any form of `source`; `null` holds out a fraction of the "
        "training data, unless `hub_validation_split` is set.",
    )
    test: Source | None = Field(
        None,
        description="Test data, in any form of `source`; `null` holds out a fraction of the "
        "training data, unless `hub_test_split` is set.",
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
        None,
        description="Maximum number of training samples, chosen by hash before their tokens are "
        "counted: samples that `prompt.overlong` leaves out are not replaced by others; `null` for "
        "all.",
    )
    max_validation_samples: Positive | None = Field(
        None, description="Maximum number of validation samples, chosen by hash; `null` for all."
    )
    max_test_samples: Positive | None = Field(
        None, description="Maximum number of test samples, chosen by hash; `null` for all."
    )
    decontaminate: Literal["none", "count", "train", "test"] = Field(
        "count",
        description="What to do with samples of training and of `test`, `validation` or a "
        "benchmark that share 13 words in a row: `none` does not look for them, `count` counts "
        "them, `train` leaves them out of training, `test` leaves them out of test and "
        "validation.",
    )
    num_workers: Positive | None = Field(
        None,
        description="Number of processes that tokenize; `null` for one per core, at most 16.",
        json_schema_extra=RUNTIME_ONLY,
    )
    documentation: DocumentationConfig = DocumentationConfig()
    tasks: TasksConfig = TasksConfig()

    @model_validator(mode="after")
    def _check_fractions(self) -> DataConfig:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction + test_fraction leave no training samples: make their sum "
                "less than 1"
            )
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        if self.source is None and not self.sources:
            raise ValueError("data.source is missing: add it, or data.sources with several")
        if self.source is not None and self.sources:
            raise ValueError("data.source and data.sources are both set: remove one of them")
        for split in HELD_OUT_SPLITS:
            self._check_held_out_split(split)
        if not self.sources:
            return self
        if self.validation is None and self.test is None:
            defaults = type(self).model_fields
            for name in ("format", "fields", "hub_subset", "hub_split", "hub_revision"):
                if getattr(self, name) != defaults[name].get_default(call_default_factory=True):
                    raise ValueError(
                        f"data.{name} has no effect beside data.sources: set {name} in each of them"
                    )
        labels = [source.label for source in self.sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"data.sources has two sources of the name {label!r}: give each a name"
                )
        return self

    def _check_held_out_split(self, split: HeldOutSplit) -> None:
        hub_split = getattr(self, f"hub_{split}_split")
        if hub_split is None or getattr(self, split) is not None:
            return
        if self.sources:
            raise ValueError(
                f"data.hub_{split}_split={hub_split} is a split of data.source, and the recipe has "
                f"data.sources: name its dataset as data.{split}"
            )
        if hub_split == self.hub_split:
            raise ValueError(
                f"data.hub_{split}_split and data.hub_split are both {hub_split!r}: name another "
                f"split for {split}"
            )

    @property
    def training_sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the training data: those of `sources`, or `source` alone."""
        return self.sources or (self._section(self.source, self.hub_split),)

    @property
    def has_domains(self) -> bool:
        """Whether samples have a domain: their own field (`fields.domain`), their source in
        a mixture, or the level of a built-in task.
        """
        sections = [*self.training_sources, *map(self.held_out_source, HELD_OUT_SPLITS)]
        named = any(
            section and (section.fields.get("domain") or section.source == TASKS)
            for section in sections
        )
        return named or len(self.sources) > 1

    def held_out_source(self, split: HeldOutSplit) -> SourceConfig | None:
        """The source of the validation or test data; None if they are a fraction of the training
        data.
        """
        source, hub_split = getattr(self, split), getattr(self, f"hub_{split}_split")
        if source is None and hub_split is None:
            return None
        return self._section(source or self.source, hub_split or self.hub_split)

    def _section(self, source: Any, hub_split: str) -> SourceConfig:
        return SourceConfig(
            source=source,
            format=self.format,
            fields=self.fields,
            hub_subset=self.hub_subset,
            hub_split=hub_split,
            hub_revision=self.hub_revision,
        )
