"""The step `rank`, which joins score shards by sample id."""

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
from manifests import seal

from pocl_ds.config import RankingConfig, registry
from pocl_ds.curriculum.ranking import DifficultyRanking, rank_by_difficulty
from pocl_ds.data.split_sources import SplitLabels
from pocl_ds.data.split_writer import save_split
from pocl_ds.difficulty import rank as rank_step
from pocl_ds.difficulty.rank import write_ranking
from pocl_ds.difficulty.ties import MAX_TIED_FRACTION, ZeroCounts
from pocl_ds.errors import ArtifactError, DataError
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

Row = tuple[str, float, float]  # id, rouge_l, cross_entropy


def _expected(rows: list[Row], **options: Any) -> DifficultyRanking:
    ids, rouge, entropy = (list(column) for column in zip(*rows, strict=True))
    return rank_by_difficulty(rouge, entropy, ids, **options)


def write_split(run: RunDirectory, ids: list[str]) -> None:
    run.data.mkdir(parents=True)
    save_split(run.data, "train", ids, [[0]] * len(ids), [0] * len(ids))


def write_shard(
    run: RunDirectory,
    rows: list[Row],
    shard: int,
    shards: int,
    *,
    finished: bool = True,
    zeros: ZeroCounts = ZeroCounts(),
    rouge_tokenizer: str = "rouge_score",
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
    if finished:
        write_manifest(
            run.scores,
            "score",
            "f",
            files=[path],
            name=path.name + ".manifest.json",
            info={"rouge_tokenizer": rouge_tokenizer, "rouge_l_zeros": zeros.to_info()},
        )
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
    write_split(run, [row[0] for row in rows])
    return run


def _rank(run: RunDirectory, fingerprint: str = "f", **config: Any) -> Any:
    return write_ranking(run, RankingConfig(**config), seed=4, fingerprint=fingerprint)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_length_ranks_without_scores(tmp_path: Path, reverse: bool) -> None:
    """Short responses first; equal ones by id."""
    run, loss_tokens = RunDirectory(tmp_path), {"d": 2, "b": 1, "a": 4, "c": 2}
    run.data.mkdir(parents=True)
    tokens = [[0] * (3 + count) for count in loss_tokens.values()]
    save_split(run.data, "train", list(loss_tokens), tokens, [3] * len(tokens))
    manifest = _rank(run, strategy="length", reverse=reverse)
    expected = ["b", "c", "d", "a"][:: -1 if reverse else 1]
    table = pq.read_table(run.ranking / "ranking.parquet").to_pydict()
    assert table == {"id": expected, "length": [loss_tokens[name] for name in expected]}
    assert manifest.info["strategy"] == "length"
    assert manifest.info["tied_fraction"] == {"length": 0.5}


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
    """Shards hold the samples in another order than the data. The ranking is that of
    `rank_by_difficulty`, however many lines are joined at a time.
    """
    monkeypatch.setattr(rank_step, "LINES_PER_CHUNK", lines)
    caplog.set_level(logging.INFO)
    shuffled = random.Random(1).sample(rows, len(rows))
    for shard in range(shards):
        write_shard(run, shuffled[shard::shards], shard, shards)
    manifest = _rank(run, **config)
    expected = _expected(rows, seed=4, **config)
    order = np.load(run.ranking / "order.npy")
    assert [rows[i][0] for i in order] == expected.ordered_ids
    table = pq.read_table(run.ranking / "ranking.parquet").to_pydict()
    assert list(table) == [
        "id",
        "rouge_l",
        "cross_entropy",
        "rank_rouge_l",
        "rank_cross_entropy",
        "rrf",
    ]
    assert table["id"] == expected.ordered_ids
    assert list(zip(table["id"], table["rouge_l"], table["cross_entropy"], strict=True)) == [
        rows[i] for i in order
    ]
    assert table["rank_rouge_l"] == expected.rank_rouge_l[order].tolist()
    assert table["rank_cross_entropy"] == expected.rank_cross_entropy[order].tolist()
    assert table["rrf"] == expected.rrf[order].tolist()
    assert manifest.info["samples"] == 60
    assert f"ranked 60 samples by {config.get('strategy', 'fusion')}: mean ROUGE-L" in caplog.text
    assert manifest.info["mean_rouge_l"] == pytest.approx(sum(row[1] for row in rows) / 60)
    assert manifest.info["mean_cross_entropy"] == pytest.approx(sum(row[2] for row in rows) / 60)
    assert set(manifest.files) == {"ranking.parquet", "order.npy"}


def test_a_finished_ranking_is_reused_and_another_recipe_replaces_it(
    run: RunDirectory, rows: list[Row]
) -> None:
    write_shard(run, rows, 0, 1)
    manifest = _rank(run)
    written = (
        (run.ranking / "order.npy").read_bytes(),
        (run.ranking / "order.npy").stat().st_mtime_ns,
    )
    assert _rank(run, reverse=True) == manifest
    assert (
        (run.ranking / "order.npy").read_bytes(),
        (run.ranking / "order.npy").stat().st_mtime_ns,
    ) == written
    _rank(run, fingerprint="g", reverse=True)
    assert (run.ranking / "order.npy").read_bytes() != written[0]


def test_warning_names_a_degenerate_metric(
    run: RunDirectory,
    rows: list[Row],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shard(
        run,
        [(name, 0.0 if i % 2 else i / 1000, entropy) for i, (name, _, entropy) in enumerate(rows)],
        0,
        1,
        zeros=ZeroCounts(no_overlap=30),
    )
    manifest = _rank(run)
    assert 0 <= manifest.info["seconds"] < 60
    assert (
        manifest.info["tied_fraction"]["rouge_l"] > 0.45
        and manifest.info["tied_fraction"]["cross_entropy"] == 0
    )
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert warnings == [
        "rank: 52% of the values of rouge_l are tied, so its ranks mean little: the student's "
        "responses to 30 of 60 samples share nothing with the references: heal the student longer "
        "(student.heal_steps), or rank by another metric (ranking.strategy)"
    ]


def test_ties_from_a_tokenizer_that_sees_no_reference_name_it(
    run: RunDirectory, rows: list[Row], caplog: pytest.LogCaptureFixture
) -> None:
    """Counts of all shards are added."""
    unseen = [(name, 0.0, entropy) for name, _, entropy in rows]
    for shard in range(2):
        zeros = ZeroCounts(unseen_references=30)
        write_shard(run, unseen[shard::2], shard, 2, zeros=zeros)
    assert _rank(run).info["rouge_tokenizer"] == "rouge_score"
    assert "the references of 60 of 60 samples have no letter a-z" in caplog.text
    assert "heal" not in caplog.text


def test_a_third_of_ties_gives_no_warning(
    run: RunDirectory, rows: list[Row], caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(
        run,
        [(name, max(i, 20) / 1000, entropy) for i, (name, _, entropy) in enumerate(rows, 1)],
        0,
        1,
    )
    assert (
        _rank(run).info["tied_fraction"]["rouge_l"] == MAX_TIED_FRACTION
        and "tied" not in caplog.text
    )


@pytest.fixture
def commas() -> Iterator[None]:
    """Register a metric `commas`, as a plugin does."""
    registry.METRICS.append("commas")
    yield
    registry.METRICS.remove("commas")


def test_plugin_metric_orders_and_is_stored(
    run: RunDirectory, rows: list[Row], commas: None
) -> None:
    path = write_shard(run, rows, 0, 1)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    path.write_text(
        "".join(
            json.dumps({**line, "metrics": {"commas": i % 7}}) + "\n"
            for i, line in enumerate(lines)
        )
    )
    seal(path.with_name(f"{path.name}.manifest.json"))
    _rank(run, strategy="commas")
    expected_order = sorted(range(60), key=lambda i: (i % 7, rows[i][2]))
    assert np.load(run.ranking / "order.npy").tolist() == expected_order
    assert pq.read_table(run.ranking / "ranking.parquet")["commas"].to_pylist() == [
        i % 7 for i in expected_order
    ]


def test_a_random_order_needs_no_scores(run: RunDirectory, rows: list[Row]) -> None:
    manifest = _rank(run, strategy="random")
    order = np.load(run.ranking / "order.npy")
    assert sorted(order.tolist()) == list(range(len(rows))) and order.tolist() != sorted(
        order.tolist()
    )
    assert [rows[i][0] for i in order] == _expected(rows, seed=4, strategy="random").ordered_ids
    assert 0 <= manifest.info.pop("seconds") < 60 and manifest.info.pop("peak_host_bytes") > 0
    assert manifest.info == {"samples": len(rows), "strategy": "random"}
    _rank(run, fingerprint="g", strategy="random", reverse=True)
    assert np.load(run.ranking / "order.npy").tolist() == order[::-1].tolist()


def test_missing_and_unfinished_shards_are_named(run: RunDirectory, rows: list[Row]) -> None:
    with pytest.raises(ArtifactError, match="no finished and undamaged scores"):
        _rank(run)
    write_shard(run, rows[:20], 0, 3)
    write_shard(run, rows[40:], 2, 3)
    with pytest.raises(
        ArtifactError, match=r"shard-00001-of-00003\.jsonl is missing, unfinished or damaged"
    ):
        _rank(run)
    write_shard(run, rows[20:40], 1, 3, finished=False)
    with pytest.raises(
        ArtifactError, match=r"shard-00001-of-00003\.jsonl is missing, unfinished or damaged"
    ):
        _rank(run)
    assert not run.ranking.exists()


def test_shards_of_other_divisions_are_ignored(run: RunDirectory, rows: list[Row]) -> None:
    write_shard(run, rows[:20], 0, 3)
    write_shard(run, rows[:30], 0, 2)
    write_shard(run, rows[30:], 1, 2)
    write_shard(run, rows[:10], 1, 6)
    assert _rank(run).info["samples"] == 60


@pytest.mark.parametrize("repeated", [False, True])
def test_a_sample_scored_twice_is_named(run: RunDirectory, rows: list[Row], repeated: bool) -> None:
    """Within a shard, and in two shards."""
    if repeated:
        write_shard(run, [*rows, rows[7]], 0, 1)
    else:
        write_shard(run, rows[:30], 0, 2)
        write_shard(run, [*rows[30:], rows[7]], 1, 2)
    with pytest.raises(ArtifactError, match=rf"second time \({rows[7][0]}\)"):
        _rank(run)


def test_samples_that_lack_a_score_or_are_unknown_are_named(
    run: RunDirectory, rows: list[Row]
) -> None:
    write_shard(run, [row for row in rows if row[0] != rows[11][0]], 0, 1)
    with pytest.raises(ArtifactError, match=rf"sample {rows[11][0]} has no score \(1 of 60"):
        _rank(run)
    write_shard(run, [*rows, ("stranger", 0.1, 1.0)], 0, 1)
    with pytest.raises(ArtifactError, match="sample stranger is not in"):
        _rank(run)


@pytest.mark.parametrize(
    "line", ["{", '{"id": "sample-0"}', '{"id": "x", "rouge_l": null, "cross_entropy": 1}', "3"]
)
def test_damaged_lines_are_named(run: RunDirectory, rows: list[Row], line: str) -> None:
    path = write_shard(run, rows, 0, 1)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    seal(path.with_name(f"{path.name}.manifest.json"))
    with pytest.raises(ArtifactError, match=r"shard-00000-of-00001\.jsonl line 61 is damaged"):
        _rank(run)


def test_a_score_that_is_not_finite_is_named(run: RunDirectory, rows: list[Row]) -> None:
    write_shard(run, [(rows[0][0], rows[0][1], math.nan), *rows[1:]], 0, 1)
    with pytest.raises(DataError, match="sample sample-0 has cross_entropy=nan"):
        _rank(run)


def test_the_table_has_the_sources_of_a_mixture(run: RunDirectory, rows: list[Row]) -> None:
    write_shard(run, rows, 0, 1)
    numbers = np.arange(len(rows), dtype=np.uint16) % 2
    SplitLabels(("a", "b"), numbers).write(run.data, "train")
    manifest = _rank(run)
    order = np.load(run.ranking / "order.npy")
    table = pq.read_table(run.ranking / "ranking.parquet").to_pydict()
    assert table["source"] == ["ab"[numbers[row]] for row in order]
    places = np.linspace(0, 1, len(rows))
    expected = {
        name: {
            "samples": int((numbers == number).sum()),
            "mean_place": pytest.approx(places[numbers[order] == number].mean()),
        }
        for number, name in enumerate("ab")
    }
    assert manifest.info["sources"] == expected
