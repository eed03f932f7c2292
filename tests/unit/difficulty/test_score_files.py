"""Scores from a Parquet file in place of the step `score`."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import pocl
from tiny_runs import write_recipe

from pocl_ds.config import RankingConfig
from pocl_ds.curriculum.ranking import rank_by_difficulty
from pocl_ds.data.split_writer import save_split
from pocl_ds.difficulty.rank import write_ranking
from pocl_ds.errors import DataError
from pocl_ds.workflow.run_dir import RunDirectory

IDS = [f"sample-{n}" + "é" * (n % 3) for n in range(40)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.data.mkdir(parents=True)
    save_split(run.data, "train", IDS, [[0]] * len(IDS), [0] * len(IDS))
    return run


@pytest.fixture
def columns() -> dict[str, list[Any]]:
    source = random.Random(2)
    return {
        "id": IDS,
        "rouge_l": [round(source.random(), 2) for _ in IDS],
        "cross_entropy": [source.random() * 4 for _ in IDS],
        "difficulty": [source.randrange(9) for _ in IDS],
        "note": ["x"] * len(IDS),
    }


def write(path: Path, columns: dict[str, list[Any]], rows: list[int]) -> str:
    """A file with these rows of the columns."""
    pq.write_table(
        pa.table({name: [values[row] for row in rows] for name, values in columns.items()}), path
    )
    return str(path)


def rank(run: RunDirectory, **config: Any) -> Any:
    return write_ranking(run, RankingConfig(**config), seed=4, fingerprint=json.dumps(config))


def ordered_ids(run: RunDirectory) -> list[str]:
    return [IDS[row] for row in np.load(run.ranking / "order.npy")]


def shuffled() -> list[int]:
    return random.Random(1).sample(range(len(IDS)), len(IDS))


@pytest.mark.parametrize("config", [{}, {"strategy": "rouge_l", "reverse": True}])
def test_a_file_gives_the_order_of_its_scores(
    run: RunDirectory, columns: dict[str, list[Any]], config: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "scores.parquet", columns, shuffled())
    manifest = rank(run, scores=path, **config)
    expected = rank_by_difficulty(columns["rouge_l"], columns["cross_entropy"], IDS, **config)
    assert ordered_ids(run) == expected.ordered_ids
    assert manifest.info["scores"] == path and "rouge_tokenizer" not in manifest.info
    # The ranking that was written is itself such a file.
    again = RunDirectory(tmp_path / "again")
    again.data.mkdir(parents=True)
    save_split(again.data, "train", IDS, [[0]] * len(IDS), [0] * len(IDS))
    rank(again, scores=str(run.ranking / "ranking.parquet"), **config)
    assert ordered_ids(again) == ordered_ids(run)


def test_the_column_difficulty_is_ranked_alone(
    run: RunDirectory,
    columns: dict[str, list[Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rows of other ids are ignored and counted."""
    columns = {name: [*values, values[0]] for name, values in columns.items()}
    columns["id"][-1] = "another"
    path = write(tmp_path / "scores.parquet", columns, [len(IDS), *shuffled()])
    with caplog.at_level(logging.WARNING):
        rank(run, scores=path, strategy="difficulty")
    assert f"1 of 41 rows of {path} are of no training sample (the first is another)" in caplog.text
    expected = sorted(range(len(IDS)), key=lambda n: (columns["difficulty"][n], IDS[n].encode()))
    assert ordered_ids(run) == [IDS[n] for n in expected]
    table = pq.read_table(run.ranking / "ranking.parquet")
    assert table["difficulty"].to_pylist() == sorted(columns["difficulty"][:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": [*IDS[:-1], IDS[0]]}, r"sample-39 has no row in|sample-0 has 2 rows in"),
        ({"id": [*IDS[:-1], "other"]}, r"sample-39 has no row .* \(1 of 40 samples have none\)"),
        ({"cross_entropy": [float("nan")] * 40}, "has cross_entropy=nan"),
        ({"cross_entropy": [None] * 40}, "has cross_entropy=nan"),
        ({"cross_entropy": ["x"] * 40}, "cannot be read"),
        ({"cross_entropy": None}, "has no column 'cross_entropy', only id, rouge_l"),
        ({"id": None}, "has no column 'id'"),
    ],
)
def test_a_bad_file_is_refused(
    run: RunDirectory,
    columns: dict[str, list[Any]],
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    columns = {name: v for name, v in {**columns, **change}.items() if v is not None}
    path = write(tmp_path / "scores.parquet", columns, list(range(len(IDS))))
    with pytest.raises(DataError, match=message):
        rank(run, scores=path)


def test_no_parquet_file_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "scores.parquet").write_text("id,difficulty\n")
    for name in ("scores.parquet", "missing.parquet"):
        with pytest.raises(DataError, match=f"{name} cannot be read .* give a Parquet file"):
            rank(run, scores=str(tmp_path / name))


def test_a_run_with_scores_of_another_run(
    tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    """The step `score` does not run, a changed file is noticed, and one without the columns stops
    the first step.
    """
    recipe = write_recipe(tmp_path, tiny_llama_untied, tiny_llama, max_train_samples=24)
    run, path = tmp_path / "run", tmp_path / "scores.parquet"
    words = ("--run-dir", str(run), f"ranking.scores={path}", "ranking.strategy=difficulty")
    pocl("preprocess", str(recipe), "--run-dir", str(run))
    ids = [name.decode() for name in np.load(run / "data" / "train.ids.npy").tolist()]
    pq.write_table(pa.table({"id": ids, "difficulty": list(range(24, 0, -1))}), path)
    pocl("rank", *words)
    assert pq.read_table(run / "ranking" / "ranking.parquet")["id"].to_pylist() == ids[::-1]
    assert not (run / "scores").exists()
    pq.write_table(pa.table({"id": ids, "difficulty": list(range(24))}), path)
    changed = pocl("rank", *words, check=False)
    assert changed.returncode == 2 and "'rank' of another recipe" in changed.stderr
    other = ("--run-dir", str(tmp_path / "other"), f"ranking.scores={path}")
    refused = pocl("preprocess", str(recipe), *other, "ranking.strategy=fusion", check=False)
    assert refused.returncode == 2 and "has no column 'rouge_l'" in refused.stderr
