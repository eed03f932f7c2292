"""Section `ranking`: from scores to the difficulty ranking."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pocl_ds.config.base import PositiveFloat, Section, registered_name
from pocl_ds.config.registry import METRICS, STRATEGIES


class RankingConfig(Section):
    """The difficulty ranking, easiest sample first (docs/method.md, eq. 3)."""

    strategy: Annotated[str, registered_name("ranking strategy", STRATEGIES, METRICS)] = Field(
        "fusion",
        description="How to rank the samples: `fusion` (reciprocal rank fusion of ROUGE-L and "
        "cross-entropy), `rouge_l`, `cross_entropy`, `random` (needs no scores), or a metric "
        "named in `score.metrics`. Plugins can register more.",
    )
    reverse: bool = Field(False, description="Reverse the ranking: hardest sample first.")
    k: PositiveFloat = Field(
        60,
        description="Constant of reciprocal rank fusion: a larger one gives the top ranks less "
        "weight.",
    )
