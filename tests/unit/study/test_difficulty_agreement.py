"""How far students agree: rank correlations against their definition, subsets against counting, and
what a run leaves.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.errors import ArtifactError
from pocl_ds.study.difficulty_agreement import (
    Seen,
    compare_pair,
    difficulty_lines,
    partial,
    ranks,
    read_seen,
    spearman,
)
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

Values = st.lists(st.integers(-5, 5), min_size=2, max_size=12)


def seen(name: str, order: list[int], tokens: list[int] | None = None) -> Seen:
    """Samples s0.. in an order; the score of a sample is its place."""
    places = np.arange(len(order), dtype=float)
    lengths = np.array([(tokens or [7] * (max(order) + 1))[number] for number in order])
    return Seen(
        name, np.array([f"s{number}".encode() for number in order]), -places, places, lengths
    )


@given(Values)
def test_ranks_count_what_is_smaller_and_half_of_what_is_equal(values: list[int]) -> None:
    expected = [
        sum(other < one for other in values) + (values.count(one) - 1) / 2 for one in values
    ]
    assert ranks(np.array(values, float)).tolist() == expected


@settings(deadline=None)
@given(st.permutations(range(9)), st.permutations(range(9)))
def test_spearman_is_the_sum_of_squares_where_nothing_ties(
    one: list[int], other: list[int]
) -> None:
    squares = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    found = spearman(np.array(one, float), np.array(other, float))
    assert found == pytest.approx(1 - 6 * squares / (9 * (81 - 1)))
    assert spearman(np.array(one, float), np.exp(np.array(other, float))) == pytest.approx(
        found
    )  # of ranks alone


def test_spearman_of_nothing_is_no_number() -> None:
    assert math.isnan(spearman(np.array([1.0]), np.array([2.0])))
    assert math.isnan(spearman(np.array([1.0, 1.0]), np.array([2.0, 3.0])))


def test_what_only_length_has_in_common_is_nothing_at_one_length() -> None:
    source = np.random.default_rng(0)
    length = source.normal(size=4000)
    one, other = length + source.normal(size=4000), length + source.normal(size=4000)
    alike = spearman(one, other)
    assert alike > 0.4
    assert abs(partial(alike, spearman(one, length), spearman(other, length))) < 0.05
    assert math.isnan(partial(1.0, 1.0, 1.0))


def test_a_pair_counts_places_of_the_samples_in_common() -> None:
    one = seen("one", [0, 1, 2, 3, 9, 4, 5, 6, 7])  # s9 is this one's alone
    other = seen("other", [1, 0, 2, 3, 4, 5, 8, 7, 6])  # and s8 the other's
    pair = compare_pair(one, other, 4)
    assert pair.samples == 8
    assert pair.same_subset == 1.0 and pair.hardest == 1.0  # only places within a subset changed
    assert pair.difficulty == pytest.approx(1 - 6 * 4 / (8 * 63))
    turned = compare_pair(one, seen("turned", [7, 6, 5, 4, 3, 2, 1, 0]), 4)
    assert turned.difficulty == -1 and turned.same_subset == turned.hardest == 0
    assert math.isnan(pair.without_length)  # all are of one length
    with pytest.raises(ArtifactError, match="one and far have 0 samples in common"):
        compare_pair(one, Seen("far", np.array([b"x"]), *(np.zeros(1),) * 2, np.ones(1, int)), 4)


def test_an_order_of_lengths_is_said() -> None:
    lines = difficulty_lines([seen("long", list(range(8)), list(range(8)))], 4)
    assert (
        lines[-1] == "long: its order is largely one of lengths (+1.00 with the response's tokens)"
    )
    assert not any("by chance" in line for line in lines)
    both = difficulty_lines([seen("a", list(range(8))), seen("b", list(range(8)))], 4)
    assert any("4 subsets (by chance 25%)" in line for line in both) and both[-1].split()[-2:] == [
        "100%",
        "100%",
    ]


def test_a_ranked_run_is_read_in_its_order(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ArtifactError, match="has no ranking: run `pocl run --until rank`"):
        read_seen(run, "a")
    for folder in (run.data, run.ranking):
        folder.mkdir(parents=True)
    np.save(run.data / "train.ids.npy", np.array([b"x", b"y", b"z"]))
    np.save(
        run.data / "train.index.npy", np.array([[0, 2, 5], [5, 1, 3], [8, 1, 9]])
    )  # start, prompt, total
    np.arange(17, dtype=np.uint32).tofile(run.data / "train.tokens.bin")
    np.save(run.ranking / "order.npy", np.array([2, 0, 1]))
    table = {"id": ["z", "x", "y"], "rouge_l": [0.9, 0.5, 0.1], "cross_entropy": [1.0, 2.0, 3.0]}
    pq.write_table(pa.table({"id": table["id"]}), run.ranking / "ranking.parquet")
    write_manifest(run.ranking, "rank", "f", info={"strategy": "random"})
    with pytest.raises(ArtifactError, match="ordered by random, without scores"):
        read_seen(run, "a")
    pq.write_table(pa.table(table), run.ranking / "ranking.parquet")
    found = read_seen(run, "a")
    assert found.ids.tolist() == [b"z", b"x", b"y"] and found.rouge_l.tolist() == [0.9, 0.5, 0.1]
    assert found.tokens.tolist() == [8, 3, 2]
