"""Intervals over items and trainings at once; what a table says beside them."""

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
from pocl_ds.study.plan import cells_of, load_study
from pocl_ds.study.run import directory
from pocl_ds.study.table import result_lines, two_level
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest

Lines = Callable[..., list[str]]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Makes the result lines of a finished study of two arms and two seeds, whose second arm
    answers everything better.
    """
    monkeypatch.setattr(table, "is_finished", lambda folder, cell: True)

    def make(
        *,
        items: int = 30,
        benchmarks: Sequence[str] = ("test",),
        marks: dict[str, Any] | None = None,
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
        for cell in cells_of(study):
            run, better = directory(tmp_path, cell), cell.arm == "pocl"
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
            said = marks or {} if better else {}
            write_json(
                run.evaluation / "results.json", {"seeds": [10], "models": results, "marks": said}
            )
            write_json(
                run.plan / "plan.json",
                {"samples": 100, "batch_size": 8, "total_steps": steps[better]},
            )
            run.train.mkdir()
            (run.train / "metrics.jsonl").write_text(
                '{"kind": "validation", "validation_ce": 5.0}\n'
            )
        return result_lines(tmp_path, study, cells_of(study))

    return make


def test_what_there_is_to_say_of_a_benchmark_is_said_of_its_arm(lines: Lines) -> None:
    found = lines(marks={"test": ["3 of 30 items seen in training"]})
    assert "test ⚠" in found[0] and found[3] == "⚠ test: 3 of 30 items seen in training (pocl)"
    assert found[4].startswith("test: pocl beside kd: better by 10.00")


def test_a_difference_that_is_everywhere_is_shown() -> None:
    found = two_level(np.full((30, 3), 2.0), resamples=200)
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0) and found.p < 0.02
    assert found.sentence == "better by 2.00 ± 0.00, p = 0.01, 3 trainings each"
    assert (
        two_level(np.full((30, 1), -2.0), resamples=200).sentence
        == "worse by 2.00 ± 0.00, p = 0.01, 1 training each"
    )


@pytest.mark.parametrize(
    ("items", "said"), [(19, "no difference shown: +2.00 ±"), (20, "better by 2.00 ±")]
)
def test_a_handful_of_items_shows_nothing(items: int, said: str, lines: Lines) -> None:
    found = two_level(np.full((items, 3), 2.0), resamples=200)
    assert found.sentence.startswith(said) and found.sentence.endswith(
        "; 19 items are too few"
    ) == (items == 19)
    assert any(
        "comparisons: of arms" in line for line in lines(items=items, benchmarks=("test", "more"))
    ) == (items == 20)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"steps": (70, 64)},
            ["NOT EQUAL: a sample is seen on average 5.60 times by kd, 5.12 times by pocl"],
        ),
        ({"steps": (1000, 1009)}, []),
        ({"kd": "3"}, ["NOT EQUAL: cells see a sample 3, 4 times"]),
    ],
)
def test_arms_that_see_samples_unequally_often_are_told(
    settings: dict[str, Any], said: list[str], lines: Lines
) -> None:
    """Dropped tails of stages count: a recipe's epochs alone do not say how many steps there are."""
    assert [line for line in lines(**settings) if line.startswith("NOT EQUAL")] == said


def test_trainings_that_disagree_show_nothing_however_many_items_there_are() -> None:
    source = np.random.default_rng(0)
    differences = source.normal(0, 0.1, (2000, 3)) + np.array([1.0, -1.0, 0.3])
    found = two_level(differences, resamples=500)
    assert found.low < 0 < found.high and found.sentence.startswith("no difference shown: +0.10 ±")
    assert (
        two_level(differences[:, :1], resamples=500).low > 0
    )  # one training alone would have claimed it


def test_few_trainings_that_scatter_are_covered_as_often_as_the_interval_says() -> None:
    """Three seeds are what studies have: drawn with replacement, as items are, they covered the
    truth in four of five trials.
    """
    source, covered = np.random.default_rng(2), 0
    for trial in range(300):
        found = two_level(
            source.normal(0, 3.0, (60, 3)) + source.normal(0, 1.5, 3), resamples=500, seed=trial
        )
        covered += found.low <= 0 <= found.high
    assert covered >= 0.92 * 300


def test_the_interval_has_the_size_that_theory_gives() -> None:
    source = np.random.default_rng(1)
    differences = source.normal(0, 3.0, (400, 40)) + source.normal(0, 2.0, 40)
    means = differences.mean(0)
    variance = means.var() / 40 + differences.mean(1).var() / 400
    found = two_level(differences, resamples=2000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.12)


@settings(deadline=None, max_examples=20)
@given(arrays(np.float64, (5, 2), elements=st.floats(-10, 10, width=32)))
def test_turned_round_it_says_the_opposite(differences: np.ndarray) -> None:
    one, other = two_level(differences, resamples=300), two_level(-differences, resamples=300)
    assert (one.mean, one.low, one.high) == pytest.approx(
        (-other.mean, -other.high, -other.low)
    ) and one.p == other.p
