"""Samples as text for the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_ds.cli.main import main
from pocl_ds.data.inspect_samples import format_samples
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """12 samples in three subsets; the last sample is the easiest."""
    run = RunDirectory(tmp_path / "run")
    run.data.mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 2), ("test", 0)):
        lines = [
            {
                "id": f"s{i}",
                "instruction": f"Say {i}.",
                "input": "",
                "references": [f"number {i}", "or\x1b[31m so"],
                "history": [],
            }
            for i in range(count)
        ]
        (run.data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_manifest(run.data, "preprocess", "d")
    run.ranking.mkdir()
    order = np.arange(12)[::-1]
    np.save(run.ranking / "order.npy", order)
    pq.write_table(
        pa.table(
            {
                "id": [f"s{i}" for i in order],
                "rouge_l": order / 20,
                "cross_entropy": 3.0 - order / 12,
            }
        ),
        run.ranking / "ranking.parquet",
    )
    write_manifest(run.ranking, "rank", "r")
    write_json(
        run.plan / "plan.json", {"stages": [{"start": 0, "stop": stop} for stop in (4, 8, 12)]}
    )
    write_manifest(run.plan, "plan", "p")
    return run


def test_shows_a_subset_from_easy_to_hard(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--run-dir", str(run.path), "--subset", "3", "--n", "2"]) == 0
    output = capsys.readouterr().out
    assert output.index("── s3  place 9 of 12  rouge_l 0.150  cross_entropy 2.750") < output.index(
        "── s0  place 12 of 12"
    )
    assert output.count("──") == 2 and "number 3" in output
    # Control characters of the data are escaped.
    assert "\x1b" not in output and r"\x1b[31m" in output


def test_shows_splits_and_the_complete_ranking(run: RunDirectory) -> None:
    assert [text.split()[1] for text in format_samples(run, count=3)] == ["s11", "s5", "s0"]
    assert [text.split()[1] for text in format_samples(run, split="validation", count=9)] == [
        "s0",
        "s1",
    ]
    (run.ranking / "manifest.json").unlink()
    assert [text.split()[1] for text in format_samples(run, count=2)] == ["s0", "s11"]


def test_errors_name_what_is_missing(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="subsets 1 to 3"):
        format_samples(run, subset=4)
    with pytest.raises(RecipeError, match="leave --split validation out"):
        format_samples(run, split="validation", subset=1)
    with pytest.raises(ArtifactError, match="holds no samples"):
        format_samples(run, split="test")
    with pytest.raises(RecipeError, match="at least one"):
        format_samples(run, count=0)
    with pytest.raises(ArtifactError, match="pocl preprocess"):
        format_samples(RunDirectory(tmp_path / "none"))
    (run.plan / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="pocl plan"):
        format_samples(run, subset=1)
    (run.ranking / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="pocl rank"):
        format_samples(run, subset=1)
