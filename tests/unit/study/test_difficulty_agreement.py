"""How far students agree: rank correlations against their definition, subsets by counting, and the
files of a run.
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

from pocl_ds.data.split_writer import save_split
from pocl_ds.errors import ArtifactError
from pocl_ds.study.difficulty_agreement import (
    RankedSamples,
    difficulty_lines,
    measure_agreement,
    partial_correlation,
    ranks,
    read_ranked_samples,
    spearman,
)
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

Values = st.lists(st.integers(-5, 5), min_size=2, max_size=12)


def ranked(name: str, order: list[int], tokens: list[int] | None = None) -> RankedSamples:
    """Samples s0, s1, ... in an order; the score of a sample is its position."""
    positions = np.arange(len(order), dtype=float)
    lengths = np.array([(tokens or [7] * (max(order) + 1))[number] for number in order])
    return RankedSamples(
        name, np.array([f"s{number}".encode() for number in order]), -positions, positions, lengths
    )


@given(Values)
def test_ranks_share_the_mean_of_ties(values: list[int]) -> None:
    expected = [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]
    assert ranks(np.array(values, float)).tolist() == expected


@settings(deadline=None)
@given(st.permutations(range(9)), st.permutations(range(9)))
def test_spearman_without_ties_follows_from_squared_differences(x: list[int], y: list[int]) -> None:
    squares = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    correlation = spearman(np.array(x, float), np.array(y, float))
    assert correlation == pytest.approx(1 - 6 * squares / (9 * (81 - 1)))
    assert spearman(np.array(x, float), np.exp(np.array(y, float))) == pytest.approx(
        correlation
    )  # depends on ranks alone


def test_spearman_of_constants_is_nan() -> None:
    assert math.isnan(spearman(np.array([1.0]), np.array([2.0])))
    assert math.isnan(spearman(np.array([1.0, 1.0]), np.array([2.0, 3.0])))


def test_the_partial_correlation_removes_a_common_cause() -> None:
    source = np.random.default_rng(0)
    length = source.normal(size=4000)
    x, y = length + source.normal(size=4000), length + source.normal(size=4000)
    correlation = spearman(x, y)
    assert correlation > 0.4
    assert abs(partial_correlation(correlation, spearman(x, length), spearman(y, length))) < 0.05
    assert math.isnan(partial_correlation(1.0, 1.0, 1.0))


def test_agreement_uses_the_common_samples() -> None:
    a = ranked("a", [0, 1, 2, 3, 9, 4, 5, 6, 7])  # only this run has s9
    b = ranked("b", [1, 0, 2, 3, 4, 5, 8, 7, 6])  # only this run has s8
    agreement = measure_agreement(a, b, 4)
    assert agreement.samples == 8
    assert (
        agreement.same_subset == 1.0 and agreement.hardest_subset == 1.0
    )  # positions change only within a subset
    assert agreement.difficulty == pytest.approx(1 - 6 * 4 / (8 * 63))
    reversed_agreement = measure_agreement(a, ranked("reversed", [7, 6, 5, 4, 3, 2, 1, 0]), 4)
    assert (
        reversed_agreement.difficulty == -1
        and reversed_agreement.same_subset == reversed_agreement.hardest_subset == 0
    )
    assert math.isnan(agreement.given_length)  # all have the same length
    with pytest.raises(ArtifactError, match="a and far have 0 samples in common"):
        measure_agreement(
            a, RankedSamples("far", np.array([b"x"]), *(np.zeros(1),) * 2, np.ones(1, int)), 4
        )


def test_a_ranking_by_length_is_reported() -> None:
    lines = difficulty_lines([ranked("long", list(range(8)), list(range(8)))], 4)
    assert lines[-1] == "long: its ranking is largely by length (+1.00 with the response's tokens)"
    assert not any("by chance" in line for line in lines)
    lines = difficulty_lines([ranked("a", list(range(8))), ranked("b", list(range(8)))], 4)
    assert any("4 subsets (by chance 25%)" in line for line in lines) and lines[-1].split()[
        -2:
    ] == [
        "100%",
        "100%",
    ]


def test_a_ranked_run_is_read_in_its_order(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ArtifactError, match="has no ranking: run `pocl run --until rank`"):
        read_ranked_samples(run, "a")
    for folder in (run.data, run.ranking):
        folder.mkdir(parents=True)
    save_split(run.data, "train", ["x", "y", "z"], [[1] * 5, [1] * 3, [1] * 9], [2, 1, 1])
    np.save(run.ranking / "order.npy", np.array([2, 0, 1]))
    table = {"id": ["z", "x", "y"], "rouge_l": [0.9, 0.5, 0.1], "cross_entropy": [1.0, 2.0, 3.0]}
    pq.write_table(pa.table({"id": table["id"]}), run.ranking / "ranking.parquet")
    write_manifest(run.ranking, "rank", "f", info={"strategy": "random"})
    with pytest.raises(ArtifactError, match="ranked by random, without scores"):
        read_ranked_samples(run, "a")
    pq.write_table(pa.table(table), run.ranking / "ranking.parquet")
    samples = read_ranked_samples(run, "a")
    assert samples.ids.tolist() == [b"z", b"x", b"y"] and samples.rouge_l.tolist() == [
        0.9,
        0.5,
        0.1,
    ]
    assert samples.tokens.tolist() == [8, 3, 2]
