"""The table of a study, and its notes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_runs import write_recipe

from pocl_ds.evaluation.answers import answers_file
from pocl_ds.study import table
from pocl_ds.study.cells import expand_cells, load_study
from pocl_ds.study.differences import two_level_difference
from pocl_ds.study.run import cell_directory
from pocl_ds.study.table import result_lines
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


@pytest.mark.parametrize(
    ("items", "start"), [(19, "no difference shown: +2.00 ±"), (20, "better by 2.00 ±")]
)
def test_few_items_show_no_difference(items: int, start: str, lines: Lines) -> None:
    difference = two_level_difference(np.full((items, 3), 2.0), resamples=200)
    assert difference.sentence().startswith(start) and difference.sentence().endswith(
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


def test_p_values_are_corrected_for_the_number_of_comparisons(lines: Lines) -> None:
    output = lines(benchmarks=("test", "more"))
    pairs = [line for line in output if ": pocl against kd" in line]
    # All three p are the smallest that 10,000 resamples can show, and Holm triples each.
    assert len(pairs) == 3 and all("p = 0.0002 (0.0006 by Holm)" in line for line in pairs)
    assert any("shows a difference with a probability of 80% from 0.00 with 3" in o for o in output)
