"""Published results in a study's file, and beside its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import write_recipe

from pocl_ds.errors import RecipeError
from pocl_ds.study.cells import StudyConfig, expand_cells, load_study
from pocl_ds.study.published import published_lines
from pocl_ds.study.run import cell_directory
from pocl_ds.workflow.files import write_json

VALUES = {
    "kd, fkl": {"test": [10.0, 0.5], "vicuna": [20.0, None]},
    "pocl, fkl": {"test": [11.0, 0.25]},
}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    recipe = write_recipe(
        tmp_path, tmp_path / "teacher", tmp_path / "student", max_train_samples=40
    )
    return {
        "name": "s",
        "base": str(recipe),
        "overrides": ["evaluate.benchmarks=[test, vicuna]", "evaluate.seeds=[10, 20]"],
        "arms": {"kd": ["curriculum.num_subsets=1", "curriculum.epochs_per_stage=4"], "pocl": []},
        "grid": {"loss": {"fkl": ["loss.name=fkl"], "rkl": ["loss.name=rkl"]}},
        "seeds": [1, 2],
        "published": {"source": "the paper, Table 1", "values": VALUES},
    }


def read_study(tree: dict[str, Any], folder: Path) -> StudyConfig:
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return load_study(str(folder / "study.yaml"))


def table(tree: dict[str, Any], folder: Path, arms: tuple[str, ...] = ("kd", "pocl")) -> list[str]:
    """The lines of a study whose trainings with seed s score (s, s + 2) on `test`, and 3 more on
    `vicuna`.
    """
    study = read_study(tree, folder)
    finished = [cell for cell in expand_cells(study) if cell.arm in arms]
    for cell in finished:
        scores = [float(cell.seed), cell.seed + 2.0]
        benchmarks = {
            "test": {"rouge_l_by_seed": scores},
            "vicuna": {"rouge_l_by_seed": [score + 3 for score in scores]},
        }
        write_json(
            cell_directory(folder, cell).evaluation / "results.json",
            {"models": {"student": {"benchmarks": benchmarks}}},
        )
    return published_lines(folder, study, finished, ["test", "vicuna"])


def columns(line: str) -> list[str]:
    return [text.strip() for text in line.split("  ") if text.strip()]


def test_published_means_stand_beside_ours_with_the_spread_of_both(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Two trainings with scores 1, 3 and 2, 4: the mean is 2.5, and the deviation over the
    evaluation seeds of either is the root of 2.
    """
    tree["published"]["note"] = "another template"
    _, header, kd, pocl, *rest = table(tree, tmp_path)
    assert columns(header) == [
        *("test", "published", "vicuna", "published"),
        *("mean of all", "published"),
    ]
    ours = ["2.50 ± 1.41", "5.50 ± 1.41", "4.00 ± 1.41"]
    assert columns(kd) == ["kd, fkl", ours[0], "10.00 ± 0.50", ours[1], "20.00", ours[2], "15.00"]
    assert columns(pocl) == ["pocl, fkl", ours[0], "11.00 ± 0.25", ours[1], "-", ours[2], "-"]
    assert rest == [
        "published: the paper, Table 1",
        "± beside published values: over the evaluation seeds of a training, averaged over "
        "trainings",
        "another template",
        "no published values: kd, rkl; pocl, rkl",
        "",
    ]


def test_deviations_over_trainings(tree: dict[str, Any], tmp_path: Path) -> None:
    """The means of the two trainings are 2 and 3."""
    tree["published"]["deviation"] = "trainings"
    lines = table(tree, tmp_path)
    assert columns(lines[2])[1] == "2.50 ± 0.71" and lines[5].endswith("over trainings")
    tree["seeds"] = [1]
    assert columns(table(tree, tmp_path)[2])[1] == "2.00"


def test_without_published_values_there_is_no_table(tree: dict[str, Any], tmp_path: Path) -> None:
    del tree["published"]["values"]["pocl, fkl"]
    assert table(tree, tmp_path, ("pocl",)) == []
    del tree["published"]
    assert table(tree, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"values": {"kd, fk": {"test": [1, 2]}}},
            r"published\.values has the group 'kd, fk', which no run is in: did you mean kd, fkl",
        ),
        (
            {"values": {"kd, fkl": {"vicunas": [1, 2]}}},
            r"published\.values of 'kd, fkl' has the benchmark 'vicunas', which is not evaluated: "
            "did you mean vicuna",
        ),
        ({"values": {"kd, fkl": {"test": [1, -2]}}}, r"fkl\.test\.1=-2: input should be greater"),
        ({"values": {"kd, fkl": {"test": [1]}}}, r"kd, fkl\.test\.1 is missing: add it"),
        ({"values": {"kd, fkl": {"test": 1}}}, r"kd, fkl\.test=1: .*write a list, as in"),
        ({"values": {}}, r"published\.values: it needs at least 1 entry"),
        ({"sources": "x"}, r"published\.sources does not exist: did you mean source"),
        ({"deviation": "seeds"}, r"published\.deviation='seeds': input should be"),
    ],
)
def test_an_error_in_published_values_names_its_place(
    change: dict[str, Any], words: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["published"] |= change
    with pytest.raises(RecipeError, match=words):
        expand_cells(read_study(tree, tmp_path))


def test_an_override_may_leave_out_a_benchmark(tree: dict[str, Any], tmp_path: Path) -> None:
    study = read_study(tree, tmp_path)
    assert len(expand_cells(study, ("evaluate.benchmarks=[test]",))) == 8
    with pytest.raises(RecipeError, match="published needs evaluated students"):
        read_study({**tree, "until": "rank"}, tmp_path)
