"""Section `score`: the difficulty of each training sample under the initial student."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from pocl_ds.config.base import (
    MAX_NEW_TOKENS_DESCRIPTION,
    RUNTIME_ONLY,
    SHARDS_DESCRIPTION,
    TOP_P_DESCRIPTION,
    NonNegativeFloat,
    Positive,
    Section,
    Shards,
    TopP,
    registered_name,
)
from pocl_ds.config.generation import GenerationConfig
from pocl_ds.config.registry import METRICS

RougeTokenizer: TypeAlias = Literal["auto", "rouge_score", "unicode_words", "characters"]


class ScoreConfig(Section):
    """The difficulty of each training sample under the initial student (docs/method.md, eq. 1 and
    2).
    """

    generation: GenerationConfig = GenerationConfig()
    temperature: NonNegativeFloat = Field(
        0.0,
        description="Sampling temperature of the student's responses; 0 decodes greedily. The "
        "authors' release of POCL samples at 0.01.",
    )
    top_p: TopP = Field(1.0, description=TOP_P_DESCRIPTION)
    max_new_tokens: Positive = Field(256, description=MAX_NEW_TOKENS_DESCRIPTION)
    count_eos: bool = Field(
        True,
        description="Include the EOS token in the cross-entropy. The authors' release of POCL "
        "does not.",
    )
    span: Literal["response", "answer"] = Field(
        "response",
        description="Which part of a response and of its reference is scored: all of it, or the "
        "`answer` after a thought, which ends with `</think>` or another closing tag. A response "
        "that never ends its thought has an empty answer.",
    )
    metrics: tuple[Annotated[str, registered_name("metric", METRICS)], ...] = Field(
        (),
        description="Further difficulty metrics to compute besides ROUGE-L and cross-entropy: "
        "names that a plugin registers with `pocl_ds.plugins.metric`.",
    )
    rouge_tokenizer: RougeTokenizer = Field(
        "auto",
        description="What ROUGE-L compares, here and in `evaluate`: `rouge_score` (stemmed words "
        "of a-z and 0-9, as the package rouge-score), `unicode_words` (words of any script that "
        "writes spaces), `characters` (single letters and digits, for Chinese, Japanese or Thai), "
        "or `auto` to choose by the letters of the references.",
    )
    shards: Shards = Field(1, description=SHARDS_DESCRIPTION, json_schema_extra=RUNTIME_ONLY)
