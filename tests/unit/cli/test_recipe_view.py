"""`pocl show` and `pocl recipes`: a resolved recipe with its differences from the defaults, and the
list of shipped recipes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import restored_signals

from pocl_ds.cli.main import main
from pocl_ds.cli.recipe_view import field_names, recipe_entries
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.resources import RECIPES, shipped_names

NAMES = shipped_names(RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shown_recipe_parses_to_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    text = "\n".join(entry.commented for entry in recipe_entries(recipe))
    assert parse_yaml(text) == recipe.model_dump(mode="json")


def test_values_that_span_lines_have_their_comment_above() -> None:
    recipe = load_recipe(
        "quickstart", ['hardware="one\\n\\ntwo: three"', "evaluate.benchmarks=[test, vicuna]"]
    )
    text = "\n".join(entry.commented for entry in recipe_entries(recipe))
    assert parse_yaml(text) == recipe.model_dump(mode="json")
    assert "# default: ''\nhardware: " in text


def test_the_command_marks_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with restored_signals():
        assert main(["show", "train.lr=0.5", "quickstart"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "name: quickstart  # required" in lines and "seed: 42" in lines
    assert [line for line in lines if line.startswith("  lr: 0.5  # default: ")]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with restored_signals():
        assert main(["show", "quickstart"]) == 0
    output = capsys.readouterr().out
    assert "\x1b[1;32mname: quickstart" in output and "\nseed: 42\n" in output


def test_field_names() -> None:
    names = field_names()
    assert {"seed", "train.lr", "train.checkpoint.keep_last", "student.lora.r"} <= set(names)
    assert "train" not in names


def test_each_shipped_recipe_has_its_hardware_and_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with restored_signals():
        assert main(["recipes"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["recipe", "hardware", "description"]
    assert [line.split()[0] for line in lines] == NAMES
    for line in lines:
        cells = [cell for cell in line.split("  ") if cell]
        assert len(cells) == 3 and cells[2].strip().endswith("."), line
