"""Ranking against its definition in plain Python (METHOD 1.4), and the stage that joins scores by
id.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.config import RankingConfig
from pocl_ds.config import registry as recipe_names
from pocl_ds.difficulty import rank as ranks
from pocl_ds.difficulty.rank import DEGENERATE, STRATEGIES, fuse, hash_ids, rank, tied_share
from pocl_ds.difficulty.score import METRICS
from pocl_ds.errors import ArtifactError, DataError, RecipeError
from pocl_ds.workflow.run_dir import RunDirectory, write_manifest

Row = tuple[str, float, float]  # id, rouge_l, cross_entropy
# Few values, so that ties of one metric and of both are common; 0.0 and -0.0 are equal.
VALUES = st.one_of(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0]), st.floats(-1e6, 1e6))
NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)
ROWS = st.dictionaries(NAMES, st.tuples(VALUES, VALUES), min_size=1, max_size=40).map(
    lambda table: [(name, *values) for name, values in table.items()]
)


def _fuse(rows: list[Row], **options: Any) -> Any:
    ids, rouge, entropy = (list(column) for column in zip(*rows, strict=True))
    return fuse(ids, rouge, entropy, **options)


def _plain(
    rows: list[Row], k: float = 60
) -> tuple[list[str], list[str], dict[str, float], list[str]]:
    """Ids by rouge_l, by cross_entropy, rrf, ids by fusion."""
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
def test_is_its_definition(rows: list[Row], k: float) -> None:
    by_rouge, by_entropy, rrf, fused = _plain(rows, k)
    ranking = _fuse(rows, k=k)
    ids = [row[0] for row in rows]
    assert ranking.order == fused
    assert ranking.rrf == rrf
    assert [ids[i] for i in ranking.order_index] == ranking.order
    assert ranking.rank_rouge_l.tolist() == [by_rouge.index(name) + 1 for name in ids]
    assert ranking.rank_cross_entropy.tolist() == [by_entropy.index(name) + 1 for name in ids]
    assert ranking.scores.tolist() == [rrf[name] for name in ids]
    assert _fuse(rows, k=k, strategy="rouge_l").order == by_rouge
    assert _fuse(rows, k=k, strategy="cross_entropy").order == by_entropy


@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(list(STRATEGIES)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_file_order_never_enters(
    rows: list[Row], source: random.Random, strategy: str, reverse: bool
) -> None:
    shuffled = source.sample(rows, len(rows))
    a, b = (
        _fuse(rows, strategy=strategy, reverse=reverse, seed=3),
        _fuse(shuffled, strategy=strategy, reverse=reverse, seed=3),
    )
    assert a.order == b.order and a.rrf == b.rrf


@given(ROWS, st.sampled_from(list(STRATEGIES)))
@settings(max_examples=100, deadline=None)
def test_reverse_is_the_order_backwards(rows: list[Row], strategy: str) -> None:
    forward = _fuse(rows, strategy=strategy, seed=1)
    backward = _fuse(rows, strategy=strategy, seed=1, reverse=True)
    assert backward.order == forward.order[::-1] and sorted(forward.order) == sorted(
        row[0] for row in rows
    )
    assert backward.rrf == forward.rrf


@given(ROWS, st.sampled_from(list(STRATEGIES)))
@settings(max_examples=100, deadline=None)
def test_ids_as_bytes_of_any_width_rank_as_strings_do(rows: list[Row], strategy: str) -> None:
    _, rouge, entropy = zip(*rows, strict=True)
    encoded = np.array([row[0].encode() for row in rows], dtype="S64")
    assert (
        fuse(encoded, rouge, entropy, strategy=strategy, seed=9).order
        == _fuse(rows, strategy=strategy, seed=9).order
    )


def test_every_strategy_of_the_recipe_is_there() -> None:
    assert list(STRATEGIES) == recipe_names.STRATEGIES
    assert list(METRICS) == recipe_names.METRICS and not set(METRICS) & set(STRATEGIES)


def test_a_worked_example() -> None:
    ranking = fuse(["easy", "mixed", "hard"], [0.9, 0.5, 0.1], [1.0, 0.5, 3.0])
    assert ranking.rank_rouge_l.tolist() == [1, 2, 3] and ranking.rank_cross_entropy.tolist() == [
        2,
        1,
        3,
    ]
    assert ranking.rrf == {
        "easy": 1 / 61 + 1 / 62,
        "mixed": 1 / 62 + 1 / 61,
        "hard": 1 / 63 + 1 / 63,
    }
    assert ranking.order == ["easy", "mixed", "hard"]  # equal rrf: the better rouge_l rank first


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_nothing_is_ordered_too(strategy: str) -> None:
    assert fuse([], [], [], strategy=strategy).order == []


def test_random_depends_on_the_seed_and_on_nothing_else() -> None:
    ids = [f"s{i}" for i in range(2000)]
    orders = [
        fuse(ids, [0.0] * 2000, [1.0] * 2000, strategy="random", seed=seed).order_index
        for seed in (0, 0, 1)
    ]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    for order in (orders[0], orders[2]):  # neither the file's order nor the other's
        assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1
    assert abs(np.corrcoef(np.argsort(orders[0]), np.argsort(orders[2]))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("ids", "rouge", "entropy", "names"),
    [
        (["a", "b"], [0.1, math.nan], [1.0, 1.0], "sample b has rouge_l=nan"),
        (["a", "b"], [0.1, 0.2], [math.inf, 1.0], "sample a has cross_entropy=inf"),
        (["a", "b", "c", "b"], [0.1] * 4, [1.0] * 4, "sample id b stands there more than once"),
        (["a", "b"], [0.1], [1.0, 2.0], "2 ids, 1 values of rouge_l and 2 of cross_entropy"),
    ],
)
def test_bad_scores_are_one_sentence(
    ids: list[str], rouge: list[float], entropy: list[float], names: str
) -> None:
    with pytest.raises(DataError, match=names):
        fuse(ids, rouge, entropy)


@given(st.lists(NAMES, max_size=8), st.integers(0, 2**64 - 1))
def test_a_hash_is_its_definition(ids: list[str], seed: int) -> None:
    """FNV-1a, then splitmix64: a random order is the same on every machine, today and tomorrow."""
    wanted = []
    for name in ids:
        state = 0xCBF29CE484222325 ^ seed
        for byte in name.encode():
            state = (state ^ byte) * 0x100000001B3 % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ state >> shift) * factor % 2**64
        wanted.append(state ^ state >> 31)
    assert hash_ids(ids, seed).tolist() == wanted


def test_ids_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "hash_ids", lambda ids, seed: np.zeros(len(ids), np.uint64))
    assert fuse(["b", "a", "c"], [0.1, 0.2, 0.3], [1.0] * 3).order == ["c", "a", "b"]
    with pytest.raises(DataError, match="sample id b stands there more than once"):
        fuse(["a", "b", "c", "b"], [0.1] * 4, [1.0] * 4)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            {"strategy": "luck", "metrics": {"words": [1.0]}},
            "ranking.strategy='luck': take one of fusion, .*random, words",
        ),
        ({"k": 0}, "ranking.k=0"),
        ({"k": -60}, "ranking.k=-60"),
        ({"k": math.nan}, "ranking.k=nan"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], names: str) -> None:
    with pytest.raises(RecipeError, match=names):
        fuse(["a"], [0.1], [1.0], **options)


@given(st.lists(st.sampled_from([0.0, -0.0, 0.1, 0.2, 0.3, 0.4]), max_size=12))
def test_tied_share_is_its_definition(values: list[float]) -> None:
    tied = [sum(value == other for other in values) > 1 for value in values]
    assert tied_share(values) == pytest.approx(sum(tied) / len(tied) if tied else 0.0)


# --- the stage
# -------------------------------------------------------------------------------------------------------


def _split(run: RunDirectory, ids: list[str]) -> None:
    run.data.mkdir(parents=True)
    np.save(run.data / "train.ids.npy", np.array([name.encode() for name in ids]))
    np.save(run.data / "train.index.npy", np.array([(i, 0, 1) for i in range(len(ids))], np.int64))
    np.zeros(len(ids), np.uint32).tofile(run.data / "train.tokens.bin")


def _shard(
    run: RunDirectory, rows: list[Row], shard: int, shards: int, *, sealed: bool = True
) -> Path:
    run.scores.mkdir(exist_ok=True)
    path = run.scores / f"shard-{shard:05d}-of-{shards:05d}.jsonl"
    lines = [
        {"id": n, "rouge_l": r, "cross_entropy": c, "tokens": 3, "response": "é\u2028"}
        for n, r, c in rows
    ]
    path.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    if sealed:
        write_manifest(run.scores, "score", "f", files=[path], name=path.name + ".manifest.json")
    return path


@pytest.fixture
def rows() -> list[Row]:
    source = random.Random(5)
    return [
        (f"sample-{i}" + "é" * (i % 3), round(source.random(), 2), source.random() * 5)
        for i in range(60)
    ]


@pytest.fixture
def run(tmp_path: Path, rows: list[Row]) -> RunDirectory:
    run = RunDirectory(tmp_path)
    _split(run, [row[0] for row in rows])
    return run


def _rank(run: RunDirectory, fingerprint: str = "f", **config: Any) -> Any:
    return rank(run, RankingConfig(**config), seed=4, fingerprint=fingerprint)


@pytest.mark.parametrize(("shards", "lines"), [(1, 1), (1, 7), (4, 100_000)])
@pytest.mark.parametrize(
    "config", [{}, {"strategy": "rouge_l", "reverse": True}, {"strategy": "cross_entropy", "k": 1}]
)
def test_shards_are_joined_by_id(
    run: RunDirectory,
    rows: list[Row],
    shards: int,
    lines: int,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lines stand in another order than the data, spread over shards at random: the ranking is that
    of `fuse`, however many lines are joined at a time.
    """
    monkeypatch.setattr(ranks, "LINES", lines)
    caplog.set_level(logging.INFO)
    shuffled = random.Random(1).sample(rows, len(rows))
    for shard in range(shards):
        _shard(run, shuffled[shard::shards], shard, shards)
    manifest = _rank(run, **config)
    expected = _fuse(rows, seed=4, **config)
    order = np.load(run.ranking / "order.npy")
    assert [rows[i][0] for i in order] == expected.order
    table = pq.read_table(run.ranking / "ranking.parquet").to_pydict()
    assert list(table) == [
        "id",
        "rouge_l",
        "cross_entropy",
        "rank_rouge_l",
        "rank_cross_entropy",
        "rrf",
    ]
    assert table["id"] == expected.order
    assert list(zip(table["id"], table["rouge_l"], table["cross_entropy"], strict=True)) == [
        rows[i] for i in order
    ]
    assert table["rank_rouge_l"] == expected.rank_rouge_l[order].tolist()
    assert table["rank_cross_entropy"] == expected.rank_cross_entropy[order].tolist()
    assert dict(zip(table["id"], table["rrf"], strict=True)) == expected.rrf
    assert manifest.info["samples"] == 60
    assert f"ranked 60 samples by {config.get('strategy', 'fusion')}: mean ROUGE-L" in caplog.text
    assert manifest.info["mean_rouge_l"] == pytest.approx(sum(row[1] for row in rows) / 60)
    assert manifest.info["mean_cross_entropy"] == pytest.approx(sum(row[2] for row in rows) / 60)
    assert set(manifest.files) == {"ranking.parquet", "order.npy"}


def test_a_finished_ranking_is_kept_and_another_recipe_replaces_it(
    run: RunDirectory, rows: list[Row]
) -> None:
    _shard(run, rows, 0, 1)
    first = _rank(run)
    written = (
        (run.ranking / "order.npy").read_bytes(),
        (run.ranking / "order.npy").stat().st_mtime_ns,
    )
    assert _rank(run, reverse=True) == first
    assert (
        (run.ranking / "order.npy").read_bytes(),
        (run.ranking / "order.npy").stat().st_mtime_ns,
    ) == written
    _rank(run, fingerprint="g", reverse=True)
    assert (run.ranking / "order.npy").read_bytes() != written[0]


def test_degenerate_metrics_are_named(
    run: RunDirectory,
    rows: list[Row],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _shard(
        run,
        [(name, 0.0 if i % 2 else i / 1000, entropy) for i, (name, _, entropy) in enumerate(rows)],
        0,
        1,
    )
    manifest = _rank(run)
    assert 0 <= manifest.info["seconds"] < 60
    assert (
        manifest.info["tied_share"]["rouge_l"] > 0.45
        and manifest.info["tied_share"]["cross_entropy"] == 0
    )
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert len(warnings) == 1 and "rouge_l is degenerate" in warnings[0]


def test_a_third_of_ties_is_not_yet_degenerate(
    run: RunDirectory, rows: list[Row], caplog: pytest.LogCaptureFixture
) -> None:
    _shard(
        run,
        [(name, max(i, 20) / 1000, entropy) for i, (name, _, entropy) in enumerate(rows, 1)],
        0,
        1,
    )
    assert (
        _rank(run).info["tied_share"]["rouge_l"] == DEGENERATE and "degenerate" not in caplog.text
    )


@pytest.fixture
def length() -> Iterator[None]:
    """A metric of that name, as a plugin registers it."""
    recipe_names.METRICS.append("length")
    yield
    recipe_names.METRICS.remove("length")


def test_a_metric_of_a_plugin_orders_and_is_kept(
    run: RunDirectory, rows: list[Row], length: None
) -> None:
    path = _shard(run, rows, 0, 1)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    path.write_text(
        "".join(
            json.dumps({**line, "metrics": {"length": i % 7}}) + "\n"
            for i, line in enumerate(lines)
        )
    )
    _rank(run, strategy="length")
    wanted = sorted(range(60), key=lambda i: (i % 7, rows[i][2]))
    assert np.load(run.ranking / "order.npy").tolist() == wanted
    assert pq.read_table(run.ranking / "ranking.parquet")["length"].to_pylist() == [
        i % 7 for i in wanted
    ]


def test_a_random_order_needs_no_scores(run: RunDirectory, rows: list[Row]) -> None:
    manifest = _rank(run, strategy="random")
    order = np.load(run.ranking / "order.npy")
    assert sorted(order.tolist()) == list(range(len(rows))) and order.tolist() != sorted(
        order.tolist()
    )
    assert [rows[i][0] for i in order] == _fuse(rows, seed=4, strategy="random").order
    assert 0 <= manifest.info.pop("seconds") < 60 and manifest.info.pop("peak_host_bytes") > 0
    assert manifest.info == {"samples": len(rows), "strategy": "random"}
    _rank(run, fingerprint="g", strategy="random", reverse=True)
    assert np.load(run.ranking / "order.npy").tolist() == order[::-1].tolist()


def test_missing_and_unfinished_shards_are_named(run: RunDirectory, rows: list[Row]) -> None:
    with pytest.raises(ArtifactError, match="no finished scores"):
        _rank(run)
    _shard(run, rows[:20], 0, 3)
    _shard(run, rows[40:], 2, 3)
    with pytest.raises(
        ArtifactError, match=r"shard-00001-of-00003\.jsonl is missing or unfinished"
    ):
        _rank(run)
    _shard(run, rows[20:40], 1, 3, sealed=False)
    with pytest.raises(
        ArtifactError, match=r"shard-00001-of-00003\.jsonl is missing or unfinished"
    ):
        _rank(run)
    assert not run.ranking.exists()


def test_leftovers_of_another_division_do_not_matter(run: RunDirectory, rows: list[Row]) -> None:
    _shard(run, rows[:20], 0, 3)
    _shard(run, rows[:30], 0, 2)
    _shard(run, rows[30:], 1, 2)
    _shard(run, rows[:10], 1, 6)
    assert _rank(run).info["samples"] == 60


@pytest.mark.parametrize("repeated", [False, True])
def test_a_sample_scored_twice_is_named(run: RunDirectory, rows: list[Row], repeated: bool) -> None:
    """Within a shard and over shards."""
    if repeated:
        _shard(run, [*rows, rows[7]], 0, 1)
    else:
        _shard(run, rows[:30], 0, 2)
        _shard(run, [*rows[30:], rows[7]], 1, 2)
    with pytest.raises(ArtifactError, match=rf"second time \({rows[7][0]}\)"):
        _rank(run)


def test_samples_that_lack_a_score_or_are_unknown_are_named(
    run: RunDirectory, rows: list[Row]
) -> None:
    _shard(run, [row for row in rows if row[0] != rows[11][0]], 0, 1)
    with pytest.raises(ArtifactError, match=rf"sample {rows[11][0]} has no score \(1 of 60"):
        _rank(run)
    _shard(run, [*rows, ("stranger", 0.1, 1.0)], 0, 1)
    with pytest.raises(ArtifactError, match="sample stranger is not in"):
        _rank(run)


@pytest.mark.parametrize(
    "line", ["{", '{"id": "sample-0"}', '{"id": "x", "rouge_l": null, "cross_entropy": 1}', "3"]
)
def test_damaged_lines_are_named(run: RunDirectory, rows: list[Row], line: str) -> None:
    path = _shard(run, rows, 0, 1)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(ArtifactError, match=r"shard-00000-of-00001\.jsonl line 61 is damaged"):
        _rank(run)


def test_a_score_that_is_not_finite_is_named(run: RunDirectory, rows: list[Row]) -> None:
    _shard(run, [(rows[0][0], rows[0][1], math.nan), *rows[1:]], 0, 1)
    with pytest.raises(DataError, match="sample sample-0 has cross_entropy=nan"):
        _rank(run)
