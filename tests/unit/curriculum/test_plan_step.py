"""The step `plan` and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_ds.config import BaselineConfig, CurriculumConfig
from pocl_ds.curriculum.plan import build_plan
from pocl_ds.curriculum.plan_step import build_baseline_plan, load_plan, write_plan
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.run_dir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.ranking.mkdir()
    np.save(run.ranking / "order.npy", np.random.default_rng(0).permutation(400))
    write_rouge_l(run, [0.5] * 400)
    return run


def write_rouge_l(run: RunDirectory, values: list[float] | None) -> None:
    """The table of the ranking, easiest first; None for one without scores."""
    columns = {"id": [str(number) for number in range(400)]}
    table = columns if values is None else {**columns, "rouge_l": values}
    pq.write_table(pa.table(table), run.ranking / "ranking.parquet")


def test_plan_is_written_and_loaded_with_its_order(run: RunDirectory) -> None:
    manifest = write_plan(
        run, CurriculumConfig(epochs_per_stage=3), batch_size=16, seed=0, fingerprint="f"
    )
    order = np.load(run.ranking / "order.npy")
    plan = load_plan(run.plan / "plan.json")
    assert plan == build_plan(order, epochs_per_stage=3, batch_size=16)
    assert list(plan.stages[1].sample_ids) == order[:200].tolist()
    assert manifest.info.pop("seconds") >= 0 and manifest.info.pop("peak_host_bytes") > 0
    assert manifest.info == {
        "samples": 400,
        "left_out": 0,
        "steps": plan.total_steps,
        "visits": plan.total_steps * 16,
        "first_subset_solved": 0.0,
    }
    assert set(read_json(run.plan / "plan.json")["stages"][0]) == {
        "index",
        "start",
        "stop",
        "temperature",
        "sft_ratio",
        "epochs",
        "steps_per_epoch",
        "steps",
    }


@pytest.mark.parametrize(
    ("solved", "changes", "warns"),
    [
        (95, {}, True),
        (89, {}, False),
        (95, {"scheduler": "all_samples"}, False),
        (95, {"num_subsets": 1}, False),
        (None, {}, False),
    ],
)
def test_a_first_subset_that_the_student_solves_is_a_warning(
    run: RunDirectory,
    solved: int | None,
    changes: dict[str, Any],
    warns: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its samples are visited most, and teach little."""
    values = None if solved is None else [1.0] * solved + [0.4] * (400 - solved)
    write_rouge_l(run, values)
    manifest = write_plan(run, CurriculumConfig(**changes), batch_size=4, seed=0, fingerprint="f")
    share = None if solved is None else solved / (400 / (changes.get("num_subsets", 4)))
    assert manifest.info["first_subset_solved"] == share
    sentence = "the student answers 95% of the first subset as the reference does (ROUGE-L 1), and "
    assert (sentence in caplog.text) == warns == ("40% of all sample visits" in caplog.text)


def test_a_finished_plan_is_reused_and_another_recipe_replaces_it(run: RunDirectory) -> None:
    write_plan(run, CurriculumConfig(num_subsets=2), batch_size=16, seed=0, fingerprint="f")
    written = (run.plan / "plan.json").stat().st_mtime_ns
    write_plan(run, CurriculumConfig(num_subsets=2), batch_size=16, seed=0, fingerprint="f")
    assert (run.plan / "plan.json").stat().st_mtime_ns == written
    write_plan(run, CurriculumConfig(num_subsets=5), batch_size=16, seed=0, fingerprint="g")
    assert len(load_plan(run.plan / "plan.json").stages) == 5


@pytest.mark.parametrize("scheduler", ["baby_step", "one_pass"])
def test_baseline_has_equally_many_visits(run: RunDirectory, scheduler: str) -> None:
    write_plan(run, CurriculumConfig(scheduler=scheduler), batch_size=16, seed=0, fingerprint="f")
    curriculum_plan = load_plan(run.plan / "plan.json")
    baseline = build_baseline_plan(
        np.arange(400), curriculum_plan, BaselineConfig(temperature=1.5, sft_ratio=0.2)
    )
    (stage,) = baseline.stages
    assert (baseline.total_steps, baseline.batch_size) == (curriculum_plan.total_steps, 16)
    assert (stage.num_samples, stage.temperature, stage.sft_ratio) == (400, 1.5, 0.2)


@pytest.mark.parametrize("order", [[0, 1, 1, 3], [0, 1, 2, 4], [-1, 0, 1, 2], [[0, 1], [2, 3]]])
def test_order_that_is_no_permutation_is_refused(run: RunDirectory, order: list) -> None:
    np.save(run.ranking / "order.npy", np.array(order))
    with pytest.raises(ArtifactError, match="every sample once"):
        write_plan(run, CurriculumConfig(num_subsets=1), batch_size=1, seed=0, fingerprint="f")
    assert not (run.plan / "manifest.json").exists()


def test_errors_of_missing_damaged_and_other_rankings(run: RunDirectory) -> None:
    write_plan(run, CurriculumConfig(), batch_size=16, seed=0, fingerprint="f")
    np.save(run.ranking / "order.npy", np.arange(399))
    with pytest.raises(ArtifactError, match="400 samples and the ranking holds 399"):
        load_plan(run.plan / "plan.json")
    (run.ranking / "order.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(ArtifactError, match="damaged"):
        load_plan(run.plan / "plan.json")
    (run.ranking / "order.npy").unlink()
    with pytest.raises(ArtifactError, match="pocl rank"):
        write_plan(run, CurriculumConfig(), batch_size=16, seed=0, fingerprint="other")


def test_too_large_batches_are_refused(run: RunDirectory) -> None:
    with pytest.raises(
        RecipeError, match="stage 0 has 100 samples, fewer than train.batch_size=128"
    ):
        write_plan(run, CurriculumConfig(), batch_size=128, seed=0, fingerprint="f")
