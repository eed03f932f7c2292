"""ROUGE-L, equal to the package rouge-score (use_stemmer=True) to the last bit, and many times as fast.

Three things make the difference: words are stemmed once and remembered, words become single characters, and the longest
common subsequence of two strings of characters is found bit-parallel (rapidfuzz) instead of cell by cell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from nltk.stem.porter import PorterStemmer
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from pocl_ds.errors import DataError

_WORD = re.compile(r"[a-z0-9]+")
_STEMMER = PorterStemmer()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure, 0 to 1: Porter stems, the maximum over references.

    Raises DataError where there is no reference.
    """
    if not references:
        raise DataError("ROUGE-L needs at least one reference: a sample without an output cannot be scored")
    words = tokens(prediction)
    return max(_f_measure(words, tokens(reference)) for reference in references)


def rouge_l_many(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """`rouge_l` of each prediction against its own references: float64 [n]."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} lists of references")
    pairs = zip(predictions, references, strict=True)
    return np.fromiter((rouge_l(*pair) for pair in pairs), np.float64, len(predictions))


def tokens(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9; those of more than three characters stemmed. As rouge-score splits."""
    return [stem for word in _WORD.findall(text.lower()) if (stem := word if len(word) <= 3 else _stem(word))]


def forget_stems() -> None:
    """Empty the memory of stems; results stay the same."""
    _stem.cache_clear()


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    stem: str = _STEMMER.stem(word)
    return stem if _WORD.fullmatch(stem) else ""


def _f_measure(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return 0.0
    numbers: dict[str, int] = {}
    left = "".join(chr(numbers.setdefault(word, len(numbers) + 1)) for word in prediction)
    right = "".join(chr(numbers.setdefault(word, len(numbers) + 1)) for word in reference)
    common = LCSseq.similarity(left, right)
    precision, recall = common / len(prediction), common / len(reference)
    # The same order of operations as rouge-score, for the same rounding.
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
