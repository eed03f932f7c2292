"""Near-duplicates between training and held-out data: samples that share 13 words in a row.

GPT-3's method (arXiv 2005.14165, appendix C): texts are compared by their runs of 13 words, in
lower case and without punctuation; a run that many samples have is part of a template and does not
count. The comparison is exact but for collisions of 64-bit hashes, and needs memory for the
held-out samples alone. MinHash would estimate how similar whole texts are, which misses an item
inside a longer text.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.conversation import DEVELOPER, SYSTEM, Sample
from pocl_ds.runtime.hashing import splitmix64

RUN_WORDS = 13
MIN_WORDS = 8  # shorter texts are equal by chance; texts up to RUN_WORDS compare as a whole
MAX_CACHED_WORDS = 1 << 20
_FILTER_BITS = 22

# Scripts without spaces between words (Thai to Khmer, kana, Han): each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_SEPARATORS = (
    r"\s\x00-/:-@\[-`{-\xa9\xab-\xb1\xb4\xb6-\xb8\xbb\xbf\xd7\xf7\u060c\u061b\u061f\u06d4\u0964"
    r"\u0965\u2000-\u206f\u2190-\u23ff\u2500-\u27bf\u3000-\u3004\u3008-\u3020\u3030\u30fb\ufe30-\ufe6f"
    r"\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^{_SEPARATORS}{_UNSPACED}]+")
_ASCII_SEPARATORS = {code: " " for code in range(128) if not chr(code).isalnum()}

# Runs are hashed as differences of a running sum of word hashes times powers of an odd number.
_BASE = 0x9E3779B97F4A7C15
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)


class _WordHashes(dict[str, int]):
    """64-bit hashes of words, the same in every process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_CACHED_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


_word_hashes = _WordHashes()


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation.

    In scripts without spaces between words each character is a word.
    """
    if text.isascii():
        return text.lower().translate(_ASCII_SEPARATORS).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def sample_texts(sample: Sample) -> list[str]:
    """The texts of a sample to compare: the conversation, and every other reference.

    System texts are left out, because many samples share one.
    """
    turns = [turn.content for turn in sample.messages if turn.role not in (SYSTEM, DEVELOPER)]
    return [" ".join([*turns[:-1], sample.input, turns[-1]]), *sample.other_references]


def hash_runs(
    texts: Iterable[tuple[int, str]],
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the runs of RUN_WORDS words of many texts, and the owner of each: [runs].

    texts: pairs of owner and text. A text of MIN_WORDS to RUN_WORDS words is one run.
    """
    values: list[int] = []
    lengths: list[int] = []
    owners: list[int] = []
    for owner, text in texts:
        words = split_words(text)
        if len(words) >= MIN_WORDS:
            values.extend(map(_word_hashes.__getitem__, words))
            lengths.append(len(words))
            owners.append(owner)
    if not lengths:
        return np.empty(0, np.uint64), np.empty(0, np.int64)

    # sums[i]: sum over the words before i.
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(np.array(values, np.uint64) * _powers(_BASE, len(values)), out=sums[1:])
    words_of_text = np.array(lengths)
    text_starts = np.cumsum(words_of_text) - words_of_text
    runs_of_text = np.maximum(words_of_text - RUN_WORDS + 1, 1)
    text_of_run = np.repeat(np.arange(len(lengths)), runs_of_text)
    first_run = np.cumsum(runs_of_text) - runs_of_text
    starts = text_starts[text_of_run] + np.arange(len(text_of_run)) - first_run[text_of_run]
    ends = starts + np.minimum(words_of_text, RUN_WORDS)[text_of_run]
    hashes = (sums[ends] - sums[starts]) * _powers(_BASE_INVERSE, len(values))[starts]
    return splitmix64(hashes), np.array(owners, np.int64)[text_of_run]


_power_tables: dict[int, NDArray[np.uint64]] = {}


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base**0, base**1 and so on, modulo 2**64: [count]."""
    table = _power_tables.get(base)
    if table is None or len(table) < count:
        factors = np.full(max(count, 1 << 16), base, np.uint64)
        factors[0] = 1
        table = _power_tables[base] = np.multiply.accumulate(factors)
    return table[:count]


class OverlapTable:
    """Hashes with their owners, in which hashes of other texts are looked up.

    Args:
        hashes: [pairs]
        owners: number of the sample that has the hash: [pairs]
        max_owners: leave out hashes that more owners have; None for no maximum.
    """

    def __init__(
        self,
        hashes: NDArray[np.uint64],
        owners: NDArray[np.int64],
        *,
        max_owners: int | None = None,
    ) -> None:
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        repeated = np.zeros(len(hashes), bool)
        repeated[1:] = (hashes[1:] == hashes[:-1]) & (owners[1:] == owners[:-1])
        hashes, owners = hashes[~repeated], owners[~repeated]
        self.keys, indices, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        self._indices, self._owners = indices, owners
        if max_owners is not None and (counts > max_owners).any():
            is_rare = counts <= max_owners
            self.keys = self.keys[is_rare]
            pairs = is_rare[indices]
            self._indices = (np.cumsum(is_rare) - 1)[indices[pairs]]
            self._owners = owners[pairs]
        # A table of bits, because most hashes that are looked up are absent.
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[self.keys >> np.uint64(64 - _FILTER_BITS)] = True

    def find(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places in `hashes` that the table has, and the index of the key at each: [found]."""
        places = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        if not len(places):
            return places, places
        indices = np.searchsorted(self.keys, hashes[places])
        present = self.keys[np.minimum(indices, len(self.keys) - 1)] == hashes[places]
        return places[present], indices[present]

    def owners_of(self, keys: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The owners of the chosen `keys` [keys], ascending, each once."""
        return np.unique(self._owners[keys[self._indices]])


class HitCollector:
    """Which rows of training share which keys of a table, in bounded memory.

    A key that more than `max_rows` rows have is part of a template: it counts for none of them.
    """

    def __init__(self, keys: int, max_rows: int) -> None:
        self.counts = np.zeros(keys, np.int64)
        self.max_rows = max_rows
        self._rows: list[NDArray[np.int64]] = []
        self._keys: list[NDArray[np.int64]] = []

    def add(self, rows: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
        """Add pairs of row and key, of rows that were not added before."""
        pairs = np.unique(np.stack([rows, keys]), axis=1)
        np.add.at(self.counts, pairs[1], 1)
        pairs = pairs[:, self.counts[pairs[1]] <= self.max_rows]
        self._rows.append(pairs[0])
        self._keys.append(pairs[1])

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows that share a key, ascending, and the shared keys as a mask [keys]."""
        valid = (self.counts > 0) & (self.counts <= self.max_rows)
        rows = [rows[valid[keys]] for rows, keys in zip(self._rows, self._keys, strict=True)]
        return np.unique(np.concatenate([np.empty(0, np.int64), *rows])), valid


def find_hits(
    table: OverlapTable, samples: Sequence[Sample]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of a sample's number and a key of the table that it has: [found], [found]."""
    texts = ((n, text) for n, sample in enumerate(samples) for text in sample_texts(sample))
    hashes, owners = hash_runs(texts)
    places, keys = table.find(hashes)
    return owners[places], keys
