"""Comparison of runs: errors, marks, names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import error_message, restored_signals
from synthetic_run import SyntheticRun

from pocl_ds.cli.main import main
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.report.compare import compare_runs, recipe_differences
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def write_run(folder: Path, *overrides: str, extra: str = "", evaluated: bool = True) -> Path:
    run = SyntheticRun(folder)
    run.plan()
    run.train()
    if evaluated:
        run.evaluation(extra=extra)
    run.run.recipe.write_text(dump_recipe(load_recipe("quickstart", list(overrides))))
    return folder


def test_a_page_compares_three_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", "train.lr=0.125", "name=other"),
        write_run(tmp_path / "c", evaluated=False),
    ]
    page = compare_runs(runs)
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "a" / "report" / "comparison.html"
    assert "train.lr" in text and "0.125" in text and "14.20 ± 0.42 (" in text
    assert "c: There is no finished evaluation" in text and "not comparable" not in text
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["items"][0]["models"] == ["a", "b"] and len(data["items"][0]["ids"]) == 30
    assert [curve["name"] for curve in data["charts"][0]["series"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("overrides", "extra", "message"),
    [
        (["evaluate.temperature=0.5"], "", r"evaluate\.temperature: \S+ in a, 0\.5 in b"),
        (
            ["evaluate.generation.dtype=bfloat16"],
            "",
            r"evaluate\.generation\.dtype: \S+ in a, bfloat16 in b",
        ),
        (["evaluate.max_new_tokens=9"], "", r"evaluate\.max_new_tokens: \d+ in a, 9 in b"),
        (["prompt.max_length=333"], "", r"prompt\.max_length: \d+ in a, 333 in b"),
        ([], "other words", "other prompts than a"),
    ],
)
def test_different_evaluations_are_an_error_or_marked(
    tmp_path: Path, overrides: list[str], extra: str, message: str
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", *overrides, extra=extra)]
    with pytest.raises(ArtifactError, match=message) as error:
        compare_runs(runs)
    assert "--force" in str(error.value) and not (tmp_path / "a" / "report").exists()
    text = compare_runs(runs, tmp_path / "page.html", force=True).read_text(encoding="utf-8")
    assert "not comparable" in text and "ROUGE-L, test ⚠" in text


def test_footnotes_name_their_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    path = runs[1] / "evaluation" / "results.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "footnotes": {"test": ["2 of 30 prompts cut"]}})
    )
    text = compare_runs(runs).read_text(encoding="utf-8")
    assert (
        "ROUGE-L, test ⚠" in text
        and "b: ⚠ test: 2 of 30 prompts cut" in text
        and "a: ⚠" not in text
    )


def write_measured_run(
    folder: Path,
    *overrides: str,
    text: str = "{}",
    tokens: str = "t",
    ids: int = 320,
    vocabulary: int = 320,
) -> Path:
    write_run(folder, "baseline.enabled=false", *overrides)
    run = RunDirectory(folder)
    run.data.mkdir()
    for name, content in (("test.jsonl", text), ("test.tokens.bin", tokens)):
        (run.data / name).write_text(content)
    write_manifest(
        run.data,
        "preprocess",
        "d" * 64,
        info={"vocabulary": vocabulary, "commits": {}, "splits": {}},
    )
    write_manifest(
        run.evaluation,
        "held_out_loss",
        "h",
        info={"ids": ids},
        files=[],
        name="held_out_loss.json.manifest.json",
    )
    return folder


OTHER_TEACHER = ["teacher.model=T", "teacher.revision=r"]


@pytest.mark.parametrize(
    ("overrides", "changes", "message", "marks_loss"),
    [
        ([], {}, "", False),
        ([], {"text": "[]", "tokens": "u"}, "a and b have different test splits.", True),
        ([], {"tokens": "u"}, "a and b have different tokenizers.", True),
        (
            [],
            {"text": "[]", "vocabulary": 9},
            "a and b have different test splits; a and b have different tokenizers.",
            True,
        ),
        ([], {"ids": 300}, "the loss of a is over 320 token ids, that of b over 300.", True),
        (OTHER_TEACHER, {}, ", that of b T at r.", False),
        (
            ["teacher.ensemble=[{model: U}]", "teacher.mode=online"],
            {},
            "while training uses a mixture of 2 teachers.",
            False,
        ),
        (
            ["teacher.quantization=bnb_8bit", "teacher.ds_config=null"],
            {},
            "while training quantizes the teacher to bnb_8bit.",
            False,
        ),
    ],
)
def test_losses_that_are_not_comparable_are_marked(
    overrides: list[str], changes: dict[str, Any], message: str, marks_loss: bool, tmp_path: Path
) -> None:
    """Nats per token depend on texts and tokenizer, KL also on the teacher."""
    runs = [
        write_measured_run(tmp_path / "a"),
        write_measured_run(tmp_path / "b", *overrides, **changes),
    ]
    text = compare_runs(runs).read_text(encoding="utf-8")
    assert message in text and "ROUGE-L, test ⚠" not in text
    assert ("held-out loss (nats/token) ⚠</th>" in text) == marks_loss and (
        "KL to teacher (nats/token) ⚠</th>" in text
    ) == bool(message)


def test_runs_without_an_evaluation_are_comparable(tmp_path: Path) -> None:
    compare_runs(
        [
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", "evaluate.temperature=0.5", evaluated=False),
        ]
    )


def test_folders_that_are_not_runs_are_errors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with pytest.raises(RecipeError, match="named twice"):
        compare_runs([run, tmp_path / "a" / ".." / "a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="not a run directory"):
        compare_runs([run, tmp_path / "empty"])


def test_runs_of_the_same_name_are_shown_with_their_paths(tmp_path: Path) -> None:
    run_a, run_b = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    text = compare_runs([run_a, run_b], tmp_path / "page.html").read_text(encoding="utf-8")
    assert str(run_a) in text and str(run_b) in text


def test_recipe_differences_are_the_fields_that_differ() -> None:
    first: dict[str, Any] = {"name": "a", "x": {"y": 1, "z": {}}}
    second: dict[str, Any] = {"name": "b", "x": {"y": 1, "z": {"w": 2}}, "v": None}
    assert recipe_differences([first, second]) == [("x.z", [{}, None]), ("x.z.w", [None, 2])]


def test_the_command_accepts_one_run_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a")
    steps: list[Any] = []
    monkeypatch.setattr(
        "pocl_ds.cli.pipeline.run_step_command",
        lambda name, words, run_dir, dry_run: steps.append((name, words, run_dir)) or 0,
    )
    with restored_signals():
        assert main(["report", "--run-dir", str(run), "report.max_items=3"]) == 0
        assert main(["report", "quickstart"]) == 0
    assert steps == [("report", ["report.max_items=3"], run), ("report", ["quickstart"], None)]
    other = shutil.copytree(run, tmp_path / "b")
    several = ["--run-dir", str(run), "--run-dir", str(other)]
    with restored_signals():
        assert main(["report", *several, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and len(steps) == 2
    for invalid in (
        [*several, "report.max_items=3"],
        [*several, "--dry-run"],
        ["--run-dir", str(run), "--force"],
    ):
        assert "several runs" in error_message(capsys, "report", *invalid)
