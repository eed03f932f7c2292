"""Ties among difficulty scores, and what causes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pocl_ds.metrics.rouge import has_tokens
from pocl_ds.metrics.rouge_tokenizer import ROUGE_SCORE

MAX_TIED_FRACTION = 1 / 3  # of a metric's values; above it, the metric's ranks mean little


@dataclass(frozen=True)
class ZeroCounts:
    """Samples whose ROUGE-L is 0, by the reason."""

    unseen_references: int = 0  # no reference has a token
    empty_responses: int = 0  # the response has no token
    no_overlap: int = 0  # the response shares no token with the references

    def __add__(self, other: ZeroCounts) -> ZeroCounts:
        return ZeroCounts(
            self.unseen_references + other.unseen_references,
            self.empty_responses + other.empty_responses,
            self.no_overlap + other.no_overlap,
        )

    def to_info(self) -> dict[str, int]:
        """The counts as they are in a manifest."""
        return asdict(self)

    @classmethod
    def from_info(cls, info: dict[str, Any]) -> ZeroCounts:
        """The counts of a manifest that holds `to_info` as `rouge_l_zeros`."""
        return cls(**info["rouge_l_zeros"])


def count_zeros(
    values: Sequence[float],
    responses: Sequence[str],
    references: Sequence[Sequence[str]],
    rouge_tokenizer: str,
) -> ZeroCounts:
    """Why values of ROUGE-L are 0."""
    unseen = empty = no_overlap = 0
    for value, response, texts in zip(values, responses, references, strict=True):
        if value:
            continue
        if not any(has_tokens(text, rouge_tokenizer) for text in texts):
            unseen += 1
        elif not has_tokens(response, rouge_tokenizer):
            empty += 1
        else:
            no_overlap += 1
    return ZeroCounts(unseen, empty, no_overlap)


def tie_warning(
    metric: str, fraction: float, samples: int, zeros: ZeroCounts, rouge_tokenizer: str
) -> str | None:
    """What a tied fraction means, what causes it and what to do; None if it is small enough."""
    if fraction <= MAX_TIED_FRACTION:
        return None
    if metric == "rouge_l":
        cause = _cause(fraction, samples, zeros, rouge_tokenizer)
    else:
        cause = "many samples have equal tokens: remove duplicates"
    return (
        f"{fraction:.0%} of the values of {metric} are tied, so its ranks mean little: {cause}, or "
        "rank by another metric (ranking.strategy)"
    )


def _cause(fraction: float, samples: int, zeros: ZeroCounts, rouge_tokenizer: str) -> str:
    """The commonest cause of tied values of ROUGE-L, and its remedy."""
    largest = max(zeros.unseen_references, zeros.empty_responses, zeros.no_overlap)
    if 2 * largest < fraction * samples:
        return (
            "many answers agree with their references to the same degree, as happens with short "
            "references: use longer ones"
        )
    counts = f"{largest} of {samples} samples"
    if largest == zeros.unseen_references:
        if rouge_tokenizer == ROUGE_SCORE:
            return (
                f"the references of {counts} have no letter a-z and no digit, all that "
                "score.rouge_tokenizer=rouge_score sees: set it to unicode_words or characters"
            )
        return f"the references of {counts} have neither letters nor digits: check the data"
    if largest == zeros.empty_responses:
        return (
            f"the student's responses to {counts} are empty or have no letters: heal the student "
            "longer (student.heal_steps)"
        )
    return (
        f"the student's responses to {counts} share nothing with the references: heal the student "
        "longer (student.heal_steps)"
    )
