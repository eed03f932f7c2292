"""Choices by hash and splitmix64 against their definitions."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.runtime.hashing import GOLDEN_GAMMA, rows_of_smallest, select_by_hash, splitmix64

IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=30)


@given(IDS, st.integers(0, 40))
def test_the_smallest_hashes_are_selected_in_the_order_of_the_input(
    ids: list[str], limit: int
) -> None:
    digests = [(hashlib.sha256(name.encode()).digest(), row) for row, name in enumerate(ids)]
    expected = sorted(row for _, row in sorted(digests)[:limit])
    assert select_by_hash(ids, limit) == expected
    assert select_by_hash([name.encode() for name in ids], limit) == expected
    assert select_by_hash(ids, None) == list(range(len(ids)))


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(0, 20))
def test_equal_keys_are_selected_in_order(keys: list[int], limit: int) -> None:
    expected = sorted(sorted(range(len(keys)), key=lambda row: (keys[row], row))[:limit])
    assert rows_of_smallest(keys, limit) == expected


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first outputs for seed 1234567, as the reference implementation has them."""
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + GOLDEN_GAMMA * np.arange(1, 6, dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
