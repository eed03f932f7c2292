"""Section `ranking`: from scores to the difficulty ranking."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pocl_ds.config.base import PositiveFloat, Section, registered_name
from pocl_ds.config.registry import METRICS, OTHER_STRATEGIES, STRATEGIES


class RankingConfig(Section):
    """The difficulty ranking, easiest sample first (docs/method.md, eq. 3)."""

    strategy: Annotated[
        str,
        registered_name("ranking strategy", STRATEGIES, OTHER_STRATEGIES, METRICS),
    ] = Field(
        "fusion",
        description="How to rank the samples: `fusion` (reciprocal rank fusion of ROUGE-L and "
        "cross-entropy), `rouge_l`, `cross_entropy`, `length` (short responses are easy) and "
        "`random`, which need no scores, `difficulty` "
        "(the column of that name in `ranking.scores`, small values are easy), or a metric named "
        "in `score.metrics`. Plugins can register more.",
    )
    scores: str | None = Field(
        None,
        min_length=1,
        description="Parquet file with scores from elsewhere, in place of the step `score`: a "
        "column `id` with each training sample's id, and the columns that the strategy reads, "
        "such as `rouge_l` and `cross_entropy`, or `difficulty`.",
    )
    reverse: bool = Field(False, description="Reverse the ranking: hardest sample first.")
    k: PositiveFloat = Field(
        60,
        description="Constant of reciprocal rank fusion: a larger one gives the top ranks less "
        "weight.",
    )
