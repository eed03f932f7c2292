"""Scores of samples by name, and the measures of difficulty that follow from them.

A measure is a pure function of `SampleScores`, and small values are easy. Plugins register more;
`config.registry.DIFFICULTIES` has the scores that each reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config.registry import MEASURED_SCORES, TEACHER_SCORES
from pocl_ds.curriculum.ranking import SampleIds, rank_by_difficulty
from pocl_ds.errors import RecipeError


@dataclass(frozen=True)
class SampleScores:
    """Scores of all training samples, each [samples] in the order of the data.

    columns: by name, such as `rouge_l` and `cross_entropy` of the step `score`, MEASURED_SCORES
    where the student scored the samples again, and `place`, from 0 for the easiest sample to 1 for
    the hardest. stage: the stage that begins, from 0.
    """

    ids: SampleIds
    columns: Mapping[str, NDArray[np.float64]]
    stage: int = 0
    seed: int = 0

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """A column. Raises RecipeError if it was not computed."""
        if name not in self.columns:
            remedy = "choose another rule, or another ranking.strategy"
            if name in MEASURED_SCORES:
                remedy = "set curriculum.rescoring.from_stage=1, which measures it"
            if name in TEACHER_SCORES:
                remedy += " with teacher.mode=online"
            raise RecipeError(
                f"curriculum: stage {self.stage + 1} needs the samples' {name}, and only "
                f"{', '.join(self.columns) or 'nothing'} is known: {remedy}"
            )
        return self.columns[name]


def _fusion(scores: SampleScores) -> NDArray[np.float64]:
    """Reciprocal rank fusion of ROUGE-L and cross-entropy (docs/method.md, eq. 3), negated."""
    ranking = rank_by_difficulty(scores["rouge_l"], scores["cross_entropy"], scores.ids)
    return -ranking.rrf


def _loss_ratio(scores: SampleScores) -> NDArray[np.float64]:
    """The student's cross-entropy divided by the teacher's (DA-KD, ICML 2025)."""
    smallest = np.finfo(np.float64).tiny
    return scores["cross_entropy"] / np.maximum(scores["teacher_cross_entropy"], smallest)


DIFFICULTIES: dict[str, Callable[[SampleScores], NDArray[np.float64]]] = {
    "fusion": _fusion,
    "cross_entropy": lambda scores: scores["cross_entropy"],
    "kd_loss": lambda scores: scores["kd_loss"],
    "loss_ratio": _loss_ratio,
}


def order_by_difficulty(
    scores: SampleScores, difficulty: str, *, reverse: bool = False
) -> NDArray[np.int64]:
    """Rows, easiest first; equal values are ordered by id.

    Raises RecipeError for a measure that needs another column, or whose values are not one finite
    number for each sample.
    """
    values = np.asarray(DIFFICULTIES[difficulty](scores), np.float64)
    if values.shape != (len(scores.ids),) or not np.isfinite(values).all():
        raise RecipeError(
            f"curriculum.rescoring.difficulty={difficulty} did not give one finite number for each "
            f"of {len(scores.ids)} samples: if the student has diverged, lower train.lr; otherwise "
            "fix the measure's function"
        )
    unknown = np.zeros(len(values))
    ranking = rank_by_difficulty(
        unknown,
        unknown,
        scores.ids,
        strategy=difficulty,
        reverse=reverse,
        metrics={difficulty: values},
    )
    return ranking.order


def places(order: NDArray[np.int64]) -> NDArray[np.float64]:
    """The place of each row in an order, from 0 for the first to 1 for the last: [rows]."""
    place = np.empty(len(order))
    place[order] = np.linspace(0, 1, len(order))
    return place
