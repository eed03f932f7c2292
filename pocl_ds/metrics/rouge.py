"""ROUGE-L (docs/method.md, eq. 1), equal bit for bit to the package rouge-score
(use_stemmer=True), and many times faster.

Each word is stemmed once and remembered as a number, texts become lists of numbers, and the longest
common subsequence of two lists is found bit-parallel (rapidfuzz) instead of cell by cell.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from pocl_ds.errors import DataError

if TYPE_CHECKING:
    from nltk.stem.porter import PorterStemmer

MAX_CACHED_WORDS = 1 << 18  # about 40 MB; a larger cache is cleared

_WORD = re.compile(r"[a-z0-9]+")


@functools.cache
def _stemmer() -> PorterStemmer:
    """The Porter stemmer that rouge-score uses. Importing nltk loads scipy, which takes seconds, so
    it waits for the first word.
    """
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


class _StemNumbers(dict[str, int]):
    """Word -> number of its stem, computed on first use.

    The number is 0 if the stem is not a word, which rouge-score drops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number_of_stem: dict[str, int] = {}
        self.next_number = itertools.count(1)

    def __missing__(self, word: str) -> int:
        # rouge-score does not stem short words.
        stem = word if len(word) <= 3 else _stemmer().stem(word)
        number = 0
        if _WORD.fullmatch(stem):
            number = self.number_of_stem.setdefault(stem, next(self.next_number))
        self[word] = number
        return number

    def stem_numbers(self, text: str) -> list[int]:
        """The stems of a text's words: lower-case runs of a-z and 0-9, as rouge-score splits."""
        return list(filter(None, map(self.__getitem__, _WORD.findall(text.lower()))))


_cache = _StemNumbers()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure with Porter stems, 0 to 1: the maximum over references.

    Raises DataError if there is no reference.
    """
    if isinstance(references, str):
        raise DataError("ROUGE-L needs a list of references, not one string: put it into a list")
    if not references:
        raise DataError(
            "ROUGE-L needs at least one reference: a sample without an output cannot be scored"
        )
    if len(_cache) > MAX_CACHED_WORDS:
        clear_stem_cache()
    cache = _cache  # another thread may replace the global one during this call
    words = cache.stem_numbers(prediction)
    return max(_f_measure(words, cache.stem_numbers(reference)) for reference in references)


def rouge_l_many(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """`rouge_l` of each prediction against its own references: float64 [n]."""
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references"
        )
    pairs = zip(predictions, references, strict=True)
    return np.fromiter((rouge_l(*pair) for pair in pairs), np.float64, len(predictions))


def clear_stem_cache() -> None:
    """Clear the cache of stems. Results do not change."""
    global _cache
    _cache = _StemNumbers()


def _f_measure(prediction: list[int], reference: list[int]) -> float:
    if not prediction or not reference:
        return 0.0
    common = LCSseq.similarity(prediction, reference)
    precision, recall = common / len(prediction), common / len(reference)
    # The same order of operations as rouge-score, for the same rounding.
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
