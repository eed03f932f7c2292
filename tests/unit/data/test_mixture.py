"""What a source contributes to a mixture follows from the ids of its samples alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data.mixture import mixture_rows
from pocl_ds.runtime.hashing import select_by_hash

WEIGHTS = st.floats(0, 1, exclude_min=True)
IDS = st.lists(st.text(st.characters(codec="utf-8"), max_size=4), unique=True, max_size=40)


@given(IDS, WEIGHTS, st.none() | st.integers(1, 50))
def test_size_and_order(ids: list[str], weight: float, limit: int | None) -> None:
    rows = mixture_rows(ids, weight, limit).tolist()
    size = round(weight * len(ids))
    assert len(rows) == (size if limit is None else min(size, limit))
    assert rows == sorted(set(rows)) and all(0 <= row < len(ids) for row in rows)


@given(IDS, WEIGHTS, st.permutations(range(40)))
def test_order_of_the_source_does_not_matter(
    ids: list[str], weight: float, order: list[int]
) -> None:
    shuffled = [ids[row] for row in order if row < len(ids)]
    chosen = {ids[row] for row in mixture_rows(ids, weight)}
    assert {shuffled[row] for row in mixture_rows(shuffled, weight)} == chosen


@given(IDS, WEIGHTS, WEIGHTS)
def test_a_smaller_weight_chooses_a_part(ids: list[str], first: float, second: float) -> None:
    small, large = sorted((first, second))
    assert set(mixture_rows(ids, small)) <= set(mixture_rows(ids, large))
    assert mixture_rows(ids, 1).tolist() == [*range(len(ids))]


def test_the_choice_is_independent_of_other_choices_by_id() -> None:
    """Else a source of half weight would have twice its part in every limited selection."""
    ids = [f"sample {n}" for n in range(4000)]
    half = np.array(select_by_hash(ids, 2000))
    common = np.intersect1d(mixture_rows(ids, 0.5), half)
    assert 900 < len(common) < 1100
