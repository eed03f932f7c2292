"""Section `evaluate`: benchmarks, standard tasks, judge and held-out loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pocl_ds.config.base import (
    FIELDS_DESCRIPTION,
    FORMAT_DESCRIPTION,
    MAX_NEW_TOKENS_DESCRIPTION,
    RUNTIME_ONLY,
    TOP_P_DESCRIPTION,
    Int,
    ModelName,
    NonNegative,
    NonNegativeFloat,
    Positive,
    RecordFields,
    RecordFormat,
    Section,
    TopP,
    split_names,
)
from pocl_ds.config.endpoint import ClientConfig, Url
from pocl_ds.config.generation import GenerationConfig
from pocl_ds.config.registry import BENCHMARKS

_KNOWN_BENCHMARKS = ", ".join(f"`{name}`" for name in BENCHMARKS)


class BenchmarkConfig(Section):
    """Prompts with references that every model answers."""

    source: str = Field(
        description="`test` for the held-out split, a known benchmark "
        f"({_KNOWN_BENCHMARKS}), a file, or the name of a Hugging Face dataset."
    )
    hub_subset: str | None = Field(
        None, description="Configuration name (subset) of a Hugging Face dataset."
    )
    hub_split: str = Field("test", description="Split of a Hugging Face dataset.")
    hub_revision: str | None = Field(
        None, description="Revision of a Hugging Face dataset: a branch, tag or commit."
    )
    format: RecordFormat = Field("auto", description=FORMAT_DESCRIPTION)
    fields: RecordFields = Field(default_factory=dict, description=FIELDS_DESCRIPTION)
    verify: Literal["number", "code"] | None = Field(
        None,
        description="Also measure how many answers are correct: `number` if an answer ends with "
        "the number that its reference ends with; `code` if its Python code passes the tests that "
        "its references are, in a sandbox (bubblewrap); `null` for neither.",
    )


class JudgeConfig(ClientConfig):
    """A language model that grades answers, behind an OpenAI-compatible endpoint."""

    base_url: Url = Field(
        description="Base URL of the endpoint, as in `http://localhost:8000/v1`, without a "
        "password or a query.",
        json_schema_extra=RUNTIME_ONLY,
    )
    model: str = Field(description="Name of the judge's model at the endpoint.")
    mode: Literal["score", "pairwise"] = Field(
        "score",
        description="`score` grades each answer from 1 to 10; `pairwise` compares it with the "
        "answer of `opponent`.",
    )
    opponent: ModelName = Field(
        "initial",
        description="With `mode: pairwise`: model whose answers the others are compared with, "
        "in both orders.",
    )
    max_samples: Positive | None = Field(
        100,
        description="Maximum number of items per benchmark, chosen by hash; `null` for all.",
    )
    num_seeds: Positive = Field(
        1, description="Number of `evaluate.seeds` whose answers are judged, from the first on."
    )
    prompt_template: str | None = Field(
        None, description="A .jinja file that replaces the built-in instructions of the judge."
    )
    temperature: NonNegativeFloat | None = Field(
        0.0, description="Sampling temperature; `null` uses the endpoint's default."
    )
    max_tokens: Positive = Field(
        512,
        description="Maximum number of tokens per verdict; a longer verdict is counted as invalid.",
    )
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        description="Name of the request parameter for that limit at the endpoint.",
        json_schema_extra=RUNTIME_ONLY,
    )


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness, which needs the package lm_eval."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(split_names), Field(min_length=1)] = Field(
        description="Names of tasks or groups, as in `gsm8k,ifeval`."
    )
    num_fewshot: NonNegative | None = Field(
        None, description="Examples in each prompt; `null` for each task's own number."
    )
    max_samples: Positive | None = Field(
        None, description="First so many documents of each task; `null` for all."
    )
    apply_chat_template: bool = Field(
        False, description="Ask in the model's chat template, as models tuned for chats need it."
    )
    include_path: str | None = Field(
        None, description="Folder with task files (.yaml) of your own."
    )


def _parse_harness(value: Any) -> Any:
    """A list of tasks in place of the section."""
    value = split_names(value) if isinstance(value, str) else value
    return {"tasks": value} if isinstance(value, (list, tuple)) else value


def _parse_benchmarks(value: Any) -> Any:
    """Benchmarks as a table of sections, from a list of names (`[dolly, vicuna]`, `dolly,vicuna`)
    or a table of names with sources.
    """
    value = split_names(value)
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        value = {name: name for name in value}
    if not isinstance(value, dict):
        return value
    return {
        name: {"source": entry} if isinstance(entry, str) else entry
        for name, entry in value.items()
    }


class EvaluateConfig(Section):
    """Which models are evaluated, and on what."""

    generation: GenerationConfig = GenerationConfig()
    benchmarks: Annotated[
        dict[str, BenchmarkConfig], BeforeValidator(_parse_benchmarks), Field(min_length=1)
    ] = Field(
        default_factory=lambda: {"test": BenchmarkConfig(source="test")},
        description="Benchmarks: a list of names (`test` for the held-out split, "
        f"{_KNOWN_BENCHMARKS}), or a table of names with a source each.",
    )
    benchmark_dir: str | None = Field(
        None,
        description="Folder with the files of known benchmarks; `null` downloads them.",
    )
    data_parallel_size: Positive = Field(
        1,
        description="Number of generation engines that share the items of one model, each on its "
        "own GPUs or CPU cores.",
        json_schema_extra=RUNTIME_ONLY,
    )
    judge: JudgeConfig | None = Field(
        None, description="A language model that also grades the answers; `null` for none."
    )
    harness: Annotated[HarnessConfig | None, BeforeValidator(_parse_harness)] = Field(
        None,
        description="Tasks of lm-evaluation-harness for every model: a list of names or a section.",
    )
    models: Annotated[tuple[ModelName, ...], BeforeValidator(split_names)] = Field(
        ("teacher", "initial", "student"),
        description="Models to evaluate. `initial` is the student before training; the baseline is "
        "added if it is trained.",
    )
    seeds: tuple[Int, ...] = Field(
        (10, 20, 30, 40, 50),
        min_length=1,
        description="Random seeds: every model answers each item once per seed.",
    )
    temperature: NonNegativeFloat = Field(
        1.0, description="Sampling temperature of the answers; 0 decodes greedily."
    )
    top_p: TopP = Field(1.0, description=TOP_P_DESCRIPTION)
    max_new_tokens: Positive = Field(256, description=MAX_NEW_TOKENS_DESCRIPTION)
    span: Literal["response", "answer"] = Field(
        "response",
        description="Which part of a response and of its references ROUGE-L and exact match "
        "compare: all of it, or the `answer` after a thought, which ends with `</think>` or "
        "another closing tag. A response that never ends its thought has an empty answer.",
    )
    max_samples: Positive | None = Field(
        None,
        description="Maximum number of items per benchmark, chosen by hash; `null` for all.",
    )
    held_out_loss: bool = Field(
        True,
        description="Also compute the loss and the KL divergence to the teacher on the references, "
        "in nats per token.",
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> EvaluateConfig:
        if self.temperature == 0 and len(self.seeds) > 1:
            raise ValueError(
                "with temperature=0 every seed gives the same answers: write one seed, or raise "
                "temperature"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed appears twice: write each seed once")
        return self
