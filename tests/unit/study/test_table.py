"""Intervals over items and trainings at once, and the notes of a study's table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_runs import write_recipe

from pocl_ds.evaluation.answers import answers_file
from pocl_ds.study import table
from pocl_ds.study.cells import expand_cells, load_study
from pocl_ds.study.run import cell_directory
from pocl_ds.study.table import result_lines, two_level_difference
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest

Lines = Callable[..., list[str]]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """A function that returns the result lines of a finished study of two arms and two seeds,
    whose second arm has better answers everywhere.
    """
    monkeypatch.setattr(table, "is_finished", lambda folder, cell: True)

    def make(
        *,
        items: int = 30,
        benchmarks: Sequence[str] = ("test",),
        footnotes: dict[str, Any] | None = None,
        steps: tuple[int, int] = (42, 42),
        kd: str = "4",
    ) -> list[str]:
        recipe = write_recipe(
            tmp_path, tmp_path / "teacher", tmp_path / "student", max_train_samples=40
        )
        tree = {
            "name": "s",
            "base": str(recipe),
            "arms": {
                "kd": ["curriculum.num_subsets=1", f"curriculum.epochs_per_stage={kd}"],
                "pocl": [],
            },
            "seeds": [1, 2],
            "compare": [["pocl", "kd"]],
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
        study = load_study(str(tmp_path / "study.yaml"))
        for cell in expand_cells(study):
            run, better = cell_directory(tmp_path, cell), cell.arm == "pocl"
            for benchmark in benchmarks:
                file = answers_file(run, "student", benchmark, 10)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(
                    "".join(
                        json.dumps(
                            {
                                "id": f"q{i}",
                                "instruction": "Q",
                                "references": ["r"],
                                "response": "x",
                                "rouge_l": 0.2 + 0.1 * better,
                            }
                        )
                        + "\n"
                        for i in range(items)
                    )
                )
                write_manifest(
                    file.parent,
                    "answers",
                    "f",
                    files=[file],
                    name=f"{file.name}.manifest.json",
                    info={"settings": {"template": "alpaca"}},
                )
            results = {
                "student": {
                    "benchmarks": {benchmark: {"rouge_l": 20.0} for benchmark in benchmarks}
                }
            }
            write_json(
                run.evaluation / "results.json",
                {
                    "seeds": [10],
                    "models": results,
                    "footnotes": (footnotes or {}) if better else {},
                },
            )
            write_json(
                run.plan / "plan.json",
                {"samples": 100, "batch_size": 8, "total_steps": steps[better]},
            )
            run.train.mkdir()
            (run.train / "metrics.jsonl").write_text(
                '{"kind": "validation", "validation_loss": 5.0}\n'
            )
        return result_lines(tmp_path, study, expand_cells(study))

    return make


def test_footnotes_name_their_arm(lines: Lines) -> None:
    output = lines(footnotes={"test": ["3 of 30 items seen in training"]})
    assert "test ⚠" in output[0] and output[3] == "⚠ test: 3 of 30 items seen in training (pocl)"
    assert output[4].startswith("test: pocl against kd: better by 10.00")


def test_a_constant_difference_is_significant() -> None:
    difference = two_level_difference(np.full((30, 3), 2.0), resamples=200)
    assert (difference.mean, difference.low, difference.high) == (
        2.0,
        2.0,
        2.0,
    ) and difference.p < 0.02
    assert difference.sentence == "better by 2.00 ± 0.00, p = 0.01, 3 trainings each"
    assert (
        two_level_difference(np.full((30, 1), -2.0), resamples=200).sentence
        == "worse by 2.00 ± 0.00, p = 0.01, 1 training each"
    )


@pytest.mark.parametrize(
    ("items", "start"), [(19, "no difference shown: +2.00 ±"), (20, "better by 2.00 ±")]
)
def test_few_items_show_no_difference(items: int, start: str, lines: Lines) -> None:
    difference = two_level_difference(np.full((items, 3), 2.0), resamples=200)
    assert difference.sentence.startswith(start) and difference.sentence.endswith(
        "; 19 items are too few"
    ) == (items == 19)
    assert any(
        "comparisons: " in line for line in lines(items=items, benchmarks=("test", "more"))
    ) == (items == 20)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"steps": (70, 64)},
            ["NOT EQUAL: a sample is visited on average 5.60 times by kd, 5.12 times by pocl"],
        ),
        ({"steps": (1000, 1009)}, []),
        ({"kd": "3"}, ["NOT EQUAL: cells visit a sample 3, 4 times"]),
    ],
)
def test_unequal_sample_visits_are_reported(
    settings: dict[str, Any], expected: list[str], lines: Lines
) -> None:
    """Dropped incomplete batches count: a recipe's epochs alone do not give the number of steps."""
    assert [line for line in lines(**settings) if line.startswith("NOT EQUAL")] == expected


def test_trainings_that_disagree_show_no_difference_for_any_number_of_items() -> None:
    source = np.random.default_rng(0)
    differences = source.normal(0, 0.1, (2000, 3)) + np.array([1.0, -1.0, 0.3])
    difference = two_level_difference(differences, resamples=500)
    assert difference.low < 0 < difference.high and difference.sentence.startswith(
        "no difference shown: +0.10 ±"
    )
    assert (
        two_level_difference(differences[:, :1], resamples=500).low > 0
    )  # one training alone would claim it


def test_the_interval_of_few_trainings_has_its_coverage() -> None:
    """Studies have about three seeds. Drawing them with replacement would cover the truth in
    only four of five trials.
    """
    source, covered = np.random.default_rng(2), 0
    for trial in range(300):
        difference = two_level_difference(
            source.normal(0, 3.0, (60, 3)) + source.normal(0, 1.5, 3), resamples=500, seed=trial
        )
        covered += difference.low <= 0 <= difference.high
    assert covered >= 0.92 * 300


def test_the_interval_has_its_theoretical_width() -> None:
    source = np.random.default_rng(1)
    differences = source.normal(0, 3.0, (400, 40)) + source.normal(0, 2.0, 40)
    means = differences.mean(0)
    variance = means.var() / 40 + differences.mean(1).var() / 400
    difference = two_level_difference(differences, resamples=2000)
    assert (difference.high - difference.low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.12)


@settings(deadline=None, max_examples=20)
@given(arrays(np.float64, (5, 2), elements=st.floats(-10, 10, width=32)))
def test_swapping_the_sides_negates_the_difference(differences: np.ndarray) -> None:
    one, other = (
        two_level_difference(differences, resamples=300),
        two_level_difference(-differences, resamples=300),
    )
    assert (one.mean, one.low, one.high) == pytest.approx(
        (-other.mean, -other.high, -other.low)
    ) and one.p == other.p
