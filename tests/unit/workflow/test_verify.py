"""`pocl verify`, and the check of what a step reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocl_ds.cli.main import main
from pocl_ds.config import Recipe
from pocl_ds.difficulty.shards import shard_file, shard_manifest
from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEPS, fingerprints
from pocl_ds.workflow.verify import check_inputs, verify_run

TREE = {
    "name": "r",
    "data": {"source": "d.jsonl"},
    "student": {"model": "m"},
    "loss": {"name": "sft"},
    "score": {"shards": 2},
}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(TREE)


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunDirectory:
    """A run whose steps have written a file each."""
    run, expected = RunDirectory(tmp_path / "run"), fingerprints(recipe)
    for step in STEPS:
        directory = step.directory(run)
        directory.mkdir(parents=True)
        if step.name == "score":
            for shard in range(2):
                path = shard_file(run, shard, 2)
                path.write_text("scores")
                write_manifest(
                    directory,
                    "score",
                    expected["score"],
                    files=[path],
                    name=shard_manifest(run, shard, 2),
                )
            continue
        (directory / "result").write_text("complete")
        write_manifest(directory, step.name, expected[step.name])
    return run


@pytest.mark.parametrize(
    ("file", "step", "maker"),
    [
        ("data/result", "score", "preprocess"),
        ("scores/shard-00001-of-00002.jsonl", "rank", "score"),
        ("models/result", "train", "init-student"),
        ("data/result", "train", "preprocess"),
        ("plan/result", "train", "plan"),
        ("train/result", "evaluate", "train"),
        ("evaluation/result", "export", "evaluate"),
    ],
)
def test_a_damaged_input_names_the_step_that_made_it(
    file: str, step: str, maker: str, run: RunDirectory, recipe: Recipe
) -> None:
    check_inputs(run, recipe, step)
    path = run.path / file
    path.write_text(path.read_text()[:-1] + "#")
    with pytest.raises(ArtifactError, match=rf"is damaged \(.*\): run `pocl {maker}` again"):
        check_inputs(run, recipe, step)
    check_inputs(run, recipe, "preprocess")


def test_verify_reads_every_file(
    run: RunDirectory, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    results = verify_run(run)
    assert len(results) == len(STEPS) + 1 and not any(result.faults for result in results)
    assert main(["verify", "--run-dir", str(run.path)]) == 0
    assert "plan/manifest.json" in capsys.readouterr().out

    # A flipped bit that left the time of modification as it was, a missing file, and half a
    # manifest.
    check_inputs(run, recipe, "train")
    damaged = run.models / "result"
    before = damaged.stat().st_mtime_ns
    damaged.write_text("completE")
    os.utime(damaged, ns=(before, before))
    (run.train / "result").unlink()
    (run.plan / "manifest.json").write_text("{")
    faults = {result.name: result.faults for result in verify_run(run) if result.faults}
    assert set(faults) == {f"{name}/manifest.json" for name in ("models", "train", "plan")}
    assert faults["models/manifest.json"] == ["result has another checksum"]
    assert faults["train/manifest.json"] == ["result is missing"]
    assert main(["verify", "--run-dir", str(run.path)]) == 2
    output = capsys.readouterr()
    assert "result has another checksum" in output.out
    assert f"3 of {len(results)} results in {run.path} are damaged" in output.err
