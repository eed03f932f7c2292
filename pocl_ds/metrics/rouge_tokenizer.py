"""Tokenizers of ROUGE-L for every script, and the choice between them from the texts.

`rouge_score` is the tokenizer of the package rouge-score: it sees the letters a to z and the digits
0 to 9 only. `unicode_words` are the words of Unicode (UAX #29), as the package `regex` segments
them; `characters` are the single letters and digits (grapheme clusters) of any script.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import regex

from pocl_ds.errors import RecipeError, did_you_mean

AUTO, ROUGE_SCORE, UNICODE_WORDS, CHARACTERS = "auto", "rouge_score", "unicode_words", "characters"
ROUGE_TOKENIZERS = (ROUGE_SCORE, UNICODE_WORDS, CHARACTERS)
# `auto` chooses rouge_score if references have on average more than this share of their letters in
# words that it sees whole: about 99% in English, even with some accents; 75 to 87% in German,
# French and Spanish.
MIN_SHARE_SEEN = 0.9
# Otherwise characters, if on average more than this share is in scripts without spaces.
MIN_SHARE_UNSPACED = 0.5
MAX_SAMPLED_CHARACTERS = 4000  # of a text, for the choice

_WORD_BOUNDARY = regex.compile(r"\b", regex.WORD | regex.V1)
_GRAPHEME = regex.compile(r"\X")
_RUN = regex.compile(r"[\p{L}\p{M}\p{Nd}]+")
_SEEN_WORD = re.compile(r"[a-z0-9]+")
_UNSPACED_LETTER = regex.compile(
    r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{scx=Yi}\p{scx=Thai}\p{scx=Lao}"
    r"\p{scx=Khmer}\p{scx=Myanmar}\p{scx=Tibetan}\p{scx=Javanese}\p{scx=Balinese}\p{scx=Tai_Le}"
    r"\p{scx=New_Tai_Lue}\p{scx=Tai_Tham}\p{scx=Tai_Viet}]&&[\p{L}\p{Nd}]]",
    regex.V1,
)


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer that suits some references, and the numbers that decided.

    The shares are of the letters and digits of a reference, averaged over the references.
    """

    name: str  # one of ROUGE_TOKENIZERS
    references: int  # with letters or digits
    share_seen: float  # in words that rouge_score sees whole
    share_unspaced: float  # in scripts without spaces between words

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.references} references have on average {self.share_seen:.1%} of "
            f"their letters in words of a-z and 0-9 alone, and {self.share_unspaced:.1%} in "
            "scripts without spaces"
        )


def choose_rouge_tokenizer(references: Iterable[str]) -> TokenizerChoice:
    """The tokenizer for these texts; rouge_score if they have neither letters nor digits."""
    shares = [share for text in references if (share := _shares(text)) is not None]
    count = len(shares)
    covered = math.fsum(share for share, _ in shares) / count if count else 1.0
    unspaced = math.fsum(share for _, share in shares) / count if count else 0.0
    if covered > MIN_SHARE_SEEN:
        name = ROUGE_SCORE
    else:
        name = CHARACTERS if unspaced > MIN_SHARE_UNSPACED else UNICODE_WORDS
    return TokenizerChoice(name, count, covered, unspaced)


def _shares(text: str) -> tuple[float, float] | None:
    """The two shares of `TokenizerChoice` in one text; None without a letter or digit."""
    letters = covered = 0
    text = unicodedata.normalize("NFC", text[:MAX_SAMPLED_CHARACTERS]).lower()
    for run in _RUN.findall(text):
        length = sum(map(str.isalnum, run))
        letters += length
        if _SEEN_WORD.fullmatch(run):
            covered += length
    return (covered / letters, len(_UNSPACED_LETTER.findall(text)) / letters) if letters else None


def resolve_rouge_tokenizer(name: str, references: Iterable[str]) -> str:
    """The tokenizer of that name, where `auto` is the one that suits the references.

    Raises RecipeError if there is no tokenizer of that name.
    """
    if name == AUTO:
        return choose_rouge_tokenizer(references).name
    if name not in ROUGE_TOKENIZERS:
        raise RecipeError(
            f"there is no ROUGE tokenizer {name!r}: {did_you_mean(name, [AUTO, *ROUGE_TOKENIZERS])}"
        )
    return name


def unicode_words(text: str) -> list[str]:
    """The words of a text by UAX #29 that have a letter or a digit, normalized and case-folded."""
    words: list[str] = _WORD_BOUNDARY.split(_fold(text))
    return [word for word in words if any(map(str.isalnum, word))]


def characters(text: str) -> list[str]:
    """The letters and digits of a text with their marks, normalized and case-folded."""
    graphemes: list[str] = _GRAPHEME.findall(_fold(text))
    return [grapheme for grapheme in graphemes if any(map(str.isalnum, grapheme))]


def _fold(text: str) -> str:
    """Equal for texts that differ in case or in the composition of accents only."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


class TokenNumbers(dict[str, int]):
    """Token -> number, given on first use."""

    def __init__(self, split: Callable[[str], list[str]]) -> None:
        super().__init__()
        self.split = split
        self.next_number = itertools.count(1)

    def __missing__(self, token: str) -> int:
        return self.setdefault(token, next(self.next_number))

    def numbers(self, text: str) -> list[int]:
        """The tokens of a text, as numbers."""
        return list(map(self.__getitem__, self.split(text)))
