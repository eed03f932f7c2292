"""Measures of a text that do not look at the overlap of words."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Equal to a reference but for case and white space."""
    found = _plain(prediction)
    return any(found == _plain(reference) for reference in references)


def repetition_rate(text: str, n: int = 3) -> float:
    """Share of n-grams of words that occurred before in the same text, 0 to 1; 0 for texts shorter than n words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
