"""Rules for the weight of each sample in the loss, and which samples are left out.

A rule is a pure function of `SampleScores` and its options, and gives one weight for each sample:
at least 0, and 0 leaves the sample out. Plugins register more; `config.registry` has the options
with their defaults, and the scores that each rule reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config.registry import SAMPLE_WEIGHTS
from pocl_ds.curriculum.plan import weights_problem
from pocl_ds.curriculum.ranking import id_as_text
from pocl_ds.curriculum.sample_scores import SampleScores
from pocl_ds.errors import RecipeError


def _pass_rate(scores: SampleScores, *, alpha: float, beta: float) -> NDArray[np.float64]:
    """p^alpha (1 - p)^beta: most weight on what the student half masters (PACED, arXiv
    2603.11178).

    The paper's p is the share of sampled answers that a verifier accepts; here it is ROUGE-L.
    """
    p = scores["rouge_l"]
    return np.asarray(p**alpha * (1 - p) ** beta)


def _band(scores: SampleScores, *, easiest: float, hardest: float) -> NDArray[np.float64]:
    """1 for samples whose place in the ranking is from `easiest` to `hardest`, else 0 (as SRD,
    arXiv 2508.06135, keeps the part of its ranking that suits the student).
    """
    place = scores["place"]
    return ((place >= easiest) & (place <= hardest)).astype(np.float64)


def _stratified(scores: SampleScores, *, share: float, hard_share: float) -> NDArray[np.float64]:
    """1 for a share of the samples, else 0: `hard_share` of them are the hardest ones, the others
    are evenly spaced over the rest of the ranking (DA-KD, ICML 2025).
    """
    order = np.argsort(scores["place"], kind="stable")
    count = max(1, round(share * len(order)))
    hardest = round(hard_share * count)
    easier, first_hardest = count - hardest, len(order) - hardest
    spaced = ((np.arange(easier) + 0.5) * first_hardest / max(easier, 1)).astype(np.int64)
    weights = np.zeros(len(order))
    weights[order[first_hardest:]] = 1
    weights[order[spaced]] = 1
    return weights


def _loss(scores: SampleScores, *, power: float) -> NDArray[np.float64]:
    """The divergence from the teacher at the newest stage boundary where the sample was scored, to
    a power.
    """
    # Rounding may leave a divergence of 0 slightly negative.
    return np.asarray(np.maximum(scores["kd_loss"], 0) ** power)


# Rules by name: (scores, **options) -> [samples].
RULES: dict[str, Callable[..., NDArray[np.float64]]] = {
    "pass_rate": _pass_rate,
    "band": _band,
    "stratified": _stratified,
    "loss": _loss,
}


def weigh_samples(
    scores: SampleScores, name: str, options: Mapping[str, Any]
) -> NDArray[np.float32]:
    """The weight of each sample by a rule: [samples].

    Raises RecipeError for a rule that needs another column, and for weights of another number, that
    are negative or not finite, or all 0.
    """
    weights = np.asarray(RULES[name](scores, **{**SAMPLE_WEIGHTS[name], **options}), np.float64)
    field = f"curriculum.sample_weights.name={name}"
    if weights.shape != (len(scores.ids),):
        raise RecipeError(
            f"{field} gave weights of shape {list(weights.shape)} for {len(scores.ids)} samples: "
            "give one for each"
        )
    # In the type that training uses: a number may be finite in float64 only.
    with np.errstate(over="ignore"):
        weights_of_loss = weights.astype(np.float32)
    problem = weights_problem(weights_of_loss, lambda row: f"sample {id_as_text(scores.ids[row])}")
    if problem:
        raise RecipeError(f"{field}: {problem}")
    return weights_of_loss
