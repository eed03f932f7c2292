"""Measures of a text that do not look at the overlap of words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Equal to a reference but for case and white space."""
    found = _plain(prediction)
    return any(found == _plain(reference) for reference in references)


def repetition_rate(text: str, n: int = 3) -> float:
    """Share of n-grams of words that occurred before in the same text, 0 to 1; 0 for texts shorter
    than n words.
    """
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all texts together, 0 to 1 (Li et al. 2016,
    arXiv 1510.03055).

    0 where no text has n words. More text gives a smaller number: compare equally many answers of
    like length only.
    """
    total, different = 0, set[tuple[str, ...]]()
    for text in texts:
        grams = _grams(text, n)
        total += len(grams)
        different.update(grams)
    return len(different) / total if total else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
