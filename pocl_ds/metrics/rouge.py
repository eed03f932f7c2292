"""ROUGE-L (docs/method.md, eq. 1). With the tokenizer `rouge_score` it is equal bit for bit to the
package rouge-score (use_stemmer=True), and many times faster; `rouge_tokenizer` has the others.

Each word is stemmed once and remembered as a number, texts become lists of numbers, and the longest
common subsequence of two lists is found bit-parallel (rapidfuzz) instead of cell by cell.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from pocl_ds.errors import DataError
from pocl_ds.metrics.rouge_tokenizer import (
    CHARACTERS,
    ROUGE_SCORE,
    UNICODE_WORDS,
    TokenNumbers,
    characters,
    resolve_rouge_tokenizer,
    unicode_words,
)

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
_SPLITTERS = {UNICODE_WORDS: unicode_words, CHARACTERS: characters}
_token_caches = {name: TokenNumbers(split) for name, split in _SPLITTERS.items()}


def rouge_l(
    prediction: str, references: Sequence[str], *, rouge_tokenizer: str = ROUGE_SCORE
) -> float:
    """ROUGE-L F-measure, 0 to 1: the maximum over references.

    Args:
        prediction: a response.
        references: at least one text that counts as correct.
        rouge_tokenizer: `rouge_score` (Porter stems of words of a-z and 0-9), `unicode_words`,
            `characters`, or `auto` to choose the one that suits the references.

    Raises:
        DataError: there is no reference.
        RecipeError: there is no tokenizer of that name.
    """
    if isinstance(references, str):
        raise DataError("ROUGE-L needs a list of references, not one string: put it into a list")
    if not references:
        raise DataError(
            "ROUGE-L needs at least one reference: a sample without an output cannot be scored"
        )
    numbers = _token_numbers(rouge_tokenizer, references)
    tokens = numbers(prediction)
    return max(_f_measure(tokens, numbers(reference)) for reference in references)


def rouge_l_many(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    rouge_tokenizer: str = ROUGE_SCORE,
) -> NDArray[np.float64]:
    """`rouge_l` of each prediction against its own references: float64 [n].

    With `auto`, all references together decide on one tokenizer.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references"
        )
    rouge_tokenizer = resolve_rouge_tokenizer(
        rouge_tokenizer, itertools.chain.from_iterable(references)
    )
    pairs = zip(predictions, references, strict=True)
    values = (rouge_l(*pair, rouge_tokenizer=rouge_tokenizer) for pair in pairs)
    return np.fromiter(values, np.float64, len(predictions))


def has_tokens(text: str, rouge_tokenizer: str) -> bool:
    """Whether a tokenizer sees anything of a text; otherwise its ROUGE-L is 0 with every text."""
    return bool(_token_numbers(rouge_tokenizer, [text])(text))


def clear_stem_cache() -> None:
    """Clear the caches of stems and tokens. Results do not change."""
    global _cache, _token_caches
    _cache = _StemNumbers()
    _token_caches = {name: TokenNumbers(split) for name, split in _SPLITTERS.items()}


def _token_numbers(rouge_tokenizer: str, references: Sequence[str]) -> Callable[[str], list[int]]:
    """The function from a text to the numbers of its tokens.

    It keeps its cache even if another thread clears the caches.
    """
    if rouge_tokenizer != ROUGE_SCORE:
        name = resolve_rouge_tokenizer(rouge_tokenizer, references)
        if name != ROUGE_SCORE:
            if len(_token_caches[name]) > MAX_CACHED_WORDS:
                clear_stem_cache()
            return _token_caches[name].numbers
    if len(_cache) > MAX_CACHED_WORDS:
        clear_stem_cache()
    return _cache.stem_numbers


def _f_measure(prediction: list[int], reference: list[int]) -> float:
    if not prediction or not reference:
        return 0.0
    common = LCSseq.similarity(prediction, reference)
    precision, recall = common / len(prediction), common / len(reference)
    # The same order of operations as rouge-score, for the same rounding.
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
