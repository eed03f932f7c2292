"""Measures of a text other than word overlap: exact match, repetition, diversity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction equals a reference, ignoring case and white space."""
    normalized = _normalize(prediction)
    return any(normalized == _normalize(reference) for reference in references)


def repetition_rate(text: str, n: int = 3) -> float:
    """Fraction of word n-grams that occurred before in the text, 0 to 1.

    0 for a text of fewer than n words.
    """
    ngrams = _ngrams(text, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct word n-grams over all n-grams of all texts, 0 to 1 (Li et al., arXiv 1510.03055).

    0 if no text has n words. More text gives smaller numbers, so compare equally many answers of
    similar length only.
    """
    total, distinct = 0, set[tuple[str, ...]]()
    for text in texts:
        ngrams = _ngrams(text, n)
        total += len(ngrams)
        distinct.update(ngrams)
    return len(distinct) / total if total else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())
