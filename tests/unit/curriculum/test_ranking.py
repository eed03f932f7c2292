"""The difficulty ranking against its definition in plain Python (docs/method.md, eq. 3)."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.config import registry
from pocl_ds.curriculum import ranking as ranking_module
from pocl_ds.curriculum.ranking import (
    STRATEGIES,
    DifficultyRanking,
    hash_ids,
    id_as_text,
    rank_by_difficulty,
    tied_fraction,
)
from pocl_ds.difficulty.plugin_metrics import METRICS
from pocl_ds.errors import DataError, RecipeError

Row = tuple[str, float, float]  # id, rouge_l, cross_entropy
# Few values, so that ties of one metric and of both are common; 0.0 and -0.0 are equal.
VALUES = st.one_of(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0]), st.floats(-1e6, 1e6))
NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)
ROWS = st.dictionaries(NAMES, st.tuples(VALUES, VALUES), min_size=1, max_size=40).map(
    lambda table: [(name, *values) for name, values in table.items()]
)


def _rank(rows: list[Row], **options: Any) -> DifficultyRanking:
    ids, rouge, entropy = (list(column) for column in zip(*rows, strict=True))
    return rank_by_difficulty(rouge, entropy, ids, **options)


def _rrf_by_id(ranking: DifficultyRanking) -> dict[str, float]:
    names = [id_as_text(name) for name in ranking.ids]
    return dict(zip(names, ranking.rrf.tolist(), strict=True))


def _reference(
    rows: list[Row], k: float = 60
) -> tuple[list[str], list[str], dict[str, float], list[str]]:
    """Ids by rouge_l, ids by cross_entropy, rrf by id, ids by fusion."""
    by_rouge = [row[0] for row in sorted(rows, key=lambda row: (-row[1], row[2], row[0].encode()))]
    by_entropy = [
        row[0] for row in sorted(rows, key=lambda row: (row[2], -row[1], row[0].encode()))
    ]
    rrf = {
        name: 1 / (k + 1 + by_rouge.index(name)) + 1 / (k + 1 + by_entropy.index(name))
        for name, _, _ in rows
    }
    return (
        by_rouge,
        by_entropy,
        rrf,
        sorted(rrf, key=lambda name: (-rrf[name], by_rouge.index(name))),
    )


@given(ROWS, st.sampled_from([1, 60, 0.5]))
@settings(max_examples=300, deadline=None)
def test_ranking_equals_its_definition(rows: list[Row], k: float) -> None:
    by_rouge, by_entropy, rrf, fused = _reference(rows, k)
    ranking = _rank(rows, k=k)
    ids = [row[0] for row in rows]
    assert ranking.ordered_ids == fused
    assert _rrf_by_id(ranking) == rrf
    assert [ids[i] for i in ranking.order] == ranking.ordered_ids
    assert ranking.rank_rouge_l.tolist() == [by_rouge.index(name) + 1 for name in ids]
    assert ranking.rank_cross_entropy.tolist() == [by_entropy.index(name) + 1 for name in ids]
    assert ranking.rrf.tolist() == [rrf[name] for name in ids]
    assert _rank(rows, k=k, strategy="rouge_l").ordered_ids == by_rouge
    assert _rank(rows, k=k, strategy="cross_entropy").ordered_ids == by_entropy


@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(list(STRATEGIES)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_ranking_does_not_depend_on_the_order_of_the_input(
    rows: list[Row], source: random.Random, strategy: str, reverse: bool
) -> None:
    shuffled = source.sample(rows, len(rows))
    a, b = (
        _rank(rows, strategy=strategy, reverse=reverse, seed=3),
        _rank(shuffled, strategy=strategy, reverse=reverse, seed=3),
    )
    assert a.ordered_ids == b.ordered_ids and _rrf_by_id(a) == _rrf_by_id(b)


@given(ROWS, st.sampled_from(list(STRATEGIES)))
@settings(max_examples=100, deadline=None)
def test_reverse_reverses_the_order(rows: list[Row], strategy: str) -> None:
    forward = _rank(rows, strategy=strategy, seed=1)
    backward = _rank(rows, strategy=strategy, seed=1, reverse=True)
    assert backward.ordered_ids == forward.ordered_ids[::-1] and sorted(
        forward.ordered_ids
    ) == sorted(row[0] for row in rows)
    assert _rrf_by_id(backward) == _rrf_by_id(forward)


@given(ROWS, st.sampled_from(list(STRATEGIES)))
@settings(max_examples=100, deadline=None)
def test_ids_may_be_bytes_of_any_width(rows: list[Row], strategy: str) -> None:
    _, rouge, entropy = zip(*rows, strict=True)
    encoded = np.array([row[0].encode() for row in rows], dtype="S64")
    assert (
        rank_by_difficulty(rouge, entropy, encoded, strategy=strategy, seed=9).ordered_ids
        == _rank(rows, strategy=strategy, seed=9).ordered_ids
    )


def test_every_strategy_of_the_recipe_is_implemented() -> None:
    assert list(STRATEGIES) == registry.STRATEGIES
    assert list(METRICS) == registry.METRICS and not set(METRICS) & set(STRATEGIES)


def test_a_worked_example() -> None:
    ranking = rank_by_difficulty([0.9, 0.5, 0.1], [1.0, 0.5, 3.0], ["easy", "mixed", "hard"])
    assert ranking.rank_rouge_l.tolist() == [1, 2, 3] and ranking.rank_cross_entropy.tolist() == [
        2,
        1,
        3,
    ]
    assert _rrf_by_id(ranking) == {
        "easy": 1 / 61 + 1 / 62,
        "mixed": 1 / 62 + 1 / 61,
        "hard": 1 / 63 + 1 / 63,
    }
    assert ranking.ordered_ids == [
        "easy",
        "mixed",
        "hard",
    ]  # equal rrf: the better rouge_l rank first


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_empty_input_has_an_empty_order(strategy: str) -> None:
    assert rank_by_difficulty([], [], [], strategy=strategy).ordered_ids == []


def test_random_order_depends_on_the_seed_alone() -> None:
    ids = [f"s{i}" for i in range(2000)]
    orders = [
        rank_by_difficulty([0.0] * 2000, [1.0] * 2000, ids, strategy="random", seed=seed).order
        for seed in (0, 0, 1)
    ]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    for order in (orders[0], orders[2]):  # unrelated to the order of the input and to each other
        assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1
    assert abs(np.corrcoef(np.argsort(orders[0]), np.argsort(orders[2]))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("ids", "rouge", "entropy", "message"),
    [
        (["a", "b"], [0.1, math.nan], [1.0, 1.0], "sample b has rouge_l=nan"),
        (["a", "b"], [0.1, 0.2], [math.inf, 1.0], "sample a has cross_entropy=inf"),
        (["a", "b", "c", "b"], [0.1] * 4, [1.0] * 4, "sample id b occurs more than once"),
        (["a", "b"], [0.1], [1.0, 2.0], "2 ids, 1 values of rouge_l and 2 of cross_entropy"),
    ],
)
def test_invalid_scores_are_errors(
    ids: list[str], rouge: list[float], entropy: list[float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        rank_by_difficulty(rouge, entropy, ids)


@given(st.lists(NAMES, max_size=8), st.integers(0, 2**64 - 1))
def test_hash_equals_its_definition(ids: list[str], seed: int) -> None:
    """FNV-1a, then splitmix64: a random order is the same on every machine and in every release."""
    expected = []
    for name in ids:
        state = 0xCBF29CE484222325 ^ seed
        for byte in name.encode():
            state = (state ^ byte) * 0x100000001B3 % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ state >> shift) * factor % 2**64
        expected.append(state ^ state >> 31)
    assert hash_ids(ids, seed).tolist() == expected


def test_ids_with_equal_hashes_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking_module, "hash_ids", lambda ids, seed: np.zeros(len(ids), np.uint64))
    assert rank_by_difficulty([0.1, 0.2, 0.3], [1.0] * 3, ["b", "a", "c"]).ordered_ids == [
        "c",
        "a",
        "b",
    ]
    with pytest.raises(DataError, match="sample id b occurs more than once"):
        rank_by_difficulty([0.1] * 4, [1.0] * 4, ["a", "b", "c", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "luck", "metrics": {"words": [1.0]}},
            "ranking.strategy='luck': use one of fusion, .*random, words",
        ),
        ({"k": 0}, "ranking.k=0"),
        ({"k": -60}, "ranking.k=-60"),
        ({"k": math.nan}, "ranking.k=nan"),
    ],
)
def test_invalid_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rank_by_difficulty([0.1], [1.0], ["a"], **options)


@given(st.lists(st.sampled_from([0.0, -0.0, 0.1, 0.2, 0.3, 0.4]), max_size=12))
def test_tied_fraction_equals_its_definition(values: list[float]) -> None:
    tied = [sum(value == other for other in values) > 1 for value in values]
    assert tied_fraction(values) == pytest.approx(sum(tied) / len(tied) if tied else 0.0)
