"""Choices and random numbers that follow from ids and seeds alone, on every machine.

numpy's generators may change between releases and Python's `hash` changes between processes, so
neither decides which samples are used.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# splitmix64 (Steele, Lea and Flood 2014): the step between states, and the factors of its mixer.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def splitmix64(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit states into random numbers: the output function of splitmix64, elementwise."""
    states = (states ^ (states >> np.uint64(30))) * _FACTOR_1
    states = (states ^ (states >> np.uint64(27))) * _FACTOR_2
    return states ^ (states >> np.uint64(31))


def token_keys(seed: int, ids: Sequence[bytes], counts: Sequence[int]) -> NDArray[np.uint64]:
    """A random key for each token of some samples, concatenated: [sum of counts].

    A key depends on the seed, the sample's id and the token's index in it, not on the other
    samples. counts: tokens of each sample.
    """
    keys = [np.empty(0, np.uint64)]
    for name, count in zip(ids, counts, strict=True):
        digest = hashlib.sha256(b"%d:%s" % (seed, name)).digest()
        start = np.frombuffer(digest[:8], "<u8").astype(np.uint64)
        keys.append(splitmix64(start + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_GAMMA))
    return np.concatenate(keys)


def rows_of_smallest(keys: Iterable[Any], limit: int) -> list[int]:
    """Ascending rows of the `limit` smallest keys, of equal keys the earlier one."""
    return sorted(
        row for _, row in heapq.nsmallest(limit, ((key, row) for row, key in enumerate(keys)))
    )


def select_by_hash(ids: Iterable[str | bytes], limit: int | None) -> list[int]:
    """Ascending rows of the `limit` ids with the smallest sha256; all rows if limit is None.

    The choice depends on ids alone, so every model, seed and run uses the same samples, and a file
    that is sorted by source still gives samples of all sources.
    """
    encoded = (name.encode() if isinstance(name, str) else bytes(name) for name in ids)
    if limit is None:
        return [row for row, _ in enumerate(encoded)]
    return rows_of_smallest((hashlib.sha256(name).digest() for name in encoded), limit)
