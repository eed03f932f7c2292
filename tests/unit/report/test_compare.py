"""Several runs on one page: what is refused, what is marked, what is told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pocl_ds.cli.main import main
from synthetic_run import SyntheticRun

from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.report.compare import compare_runs, recipe_differences
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def made(folder: Path, *overrides: str, extra: str = "", evaluated: bool = True) -> Path:
    run = SyntheticRun(folder)
    run.plan()
    run.train()
    if evaluated:
        run.evaluation(extra=extra)
    run.run.recipe.write_text(dump_recipe(load_recipe("quickstart", list(overrides))))
    return folder


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / "a"),
        made(tmp_path / "b", "train.lr=0.125", "name=other"),
        made(tmp_path / "c", evaluated=False),
    ]
    page = compare_runs(runs)
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "a" / "report" / "comparison.html"
    assert "train.lr" in text and "0.125" in text and "14.20 ± 0.42 (" in text
    assert "c: There is no finished evaluation" in text and "do not compare" not in text
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["items"][0]["models"] == ["a", "b"] and len(data["items"][0]["ids"]) == 30
    assert [one["name"] for one in data["charts"][0]["series"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("overrides", "extra", "said"),
    [
        (["evaluate.temperature=0.5"], "", r"evaluate\.temperature: \S+ in a, 0\.5 in b"),
        (
            ["evaluate.generation.dtype=bfloat16"],
            "",
            r"evaluate\.generation\.dtype: float32 in a, bfloat16 in b",
        ),
        (["evaluate.max_new_tokens=9"], "", r"evaluate\.max_new_tokens: \d+ in a, 9 in b"),
        (["prompt.max_length=333"], "", r"prompt\.max_length: \d+ in a, 333 in b"),
        ([], "other words", "other questions than a"),
    ],
)
def test_other_ways_of_measuring_are_refused_or_marked(
    tmp_path: Path, overrides: list[str], extra: str, said: str
) -> None:
    runs = [made(tmp_path / "a"), made(tmp_path / "b", *overrides, extra=extra)]
    with pytest.raises(ArtifactError, match=said) as refused:
        compare_runs(runs)
    assert "--force" in str(refused.value) and not (tmp_path / "a" / "report").exists()
    text = compare_runs(runs, tmp_path / "page.html", force=True).read_text(encoding="utf-8")
    assert "do not compare" in text and "ROUGE-L, test ⚠" in text


def test_what_there_is_to_say_of_a_benchmark_is_said_of_its_run(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a"), made(tmp_path / "b")]
    path = runs[1] / "evaluation" / "results.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "marks": {"test": ["2 of 30 prompts cut"]}})
    )
    text = compare_runs(runs).read_text(encoding="utf-8")
    assert (
        "ROUGE-L, test ⚠" in text
        and "b: ⚠ test: 2 of 30 prompts cut" in text
        and "a: ⚠" not in text
    )


def measured(
    folder: Path,
    *overrides: str,
    text: str = "{}",
    tokens: str = "t",
    ids: int = 320,
    vocabulary: int = 320,
) -> Path:
    made(folder, "baseline.enabled=false", *overrides)
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
        "held_out",
        "h",
        info={"ids": ids},
        files=[],
        name="held_out.json.manifest.json",
    )
    return folder


OTHER_TEACHER = ["teacher.model=T", "teacher.revision=r"]


@pytest.mark.parametrize(
    ("overrides", "changes", "said", "both"),
    [
        ([], {}, "", False),
        ([], {"text": "[]", "tokens": "u"}, "a and b have other test splits.", True),
        ([], {"tokens": "u"}, "a and b split texts into other tokens.", True),
        (
            [],
            {"text": "[]", "vocabulary": 9},
            "a and b have other test splits; a and b split texts into other tokens.",
            True,
        ),
        ([], {"ids": 300}, "a counts 320 token ids and b 300.", True),
        (OTHER_TEACHER, {}, "and that of b T at r.", False),
        (
            ["teacher.ensemble=[{model: U}]", "teacher.mode=online"],
            {},
            "not to the mixture of 2 that training asked.",
            False,
        ),
        (
            ["teacher.quantization=bnb_8bit", "teacher.ds_config=null"],
            {},
            "not quantised to bnb_8bit as training asked it.",
            False,
        ),
    ],
)
def test_losses_that_do_not_compare_are_marked(
    overrides: list[str], changes: dict[str, Any], said: str, both: bool, tmp_path: Path
) -> None:
    """Nats a token are of some texts in some tokens, KL is to some teacher: the rows stay, with a
    sign and a sentence.
    """
    runs = [measured(tmp_path / "a"), measured(tmp_path / "b", *overrides, **changes)]
    text = compare_runs(runs).read_text(encoding="utf-8")
    assert said in text and "ROUGE-L, test ⚠" not in text
    assert ("held-out loss (nats/token) ⚠</th>" in text) == both and (
        "KL to teacher (nats/token) ⚠</th>" in text
    ) == bool(said)


def test_other_ways_do_not_matter_where_nothing_was_measured(tmp_path: Path) -> None:
    compare_runs(
        [made(tmp_path / "a"), made(tmp_path / "b", "evaluate.temperature=0.5", evaluated=False)]
    )


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    run = made(tmp_path / "a")
    with pytest.raises(RecipeError, match="named twice"):
        compare_runs([run, tmp_path / "a" / ".." / "a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="not a run directory"):
        compare_runs([run, tmp_path / "empty"])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    first, second = made(tmp_path / "x" / "run"), made(tmp_path / "y" / "run")
    text = compare_runs([first, second], tmp_path / "page.html").read_text(encoding="utf-8")
    assert str(first) in text and str(second) in text


def test_differences_are_fields_that_are_not_the_same_in_all() -> None:
    first: dict[str, Any] = {"name": "a", "x": {"y": 1, "z": {}}}
    second: dict[str, Any] = {"name": "b", "x": {"y": 1, "z": {"w": 2}}, "v": None}
    assert recipe_differences([first, second]) == [("x.z", [{}, None]), ("x.z.w", [None, 2])]


def test_the_command_line_tells_one_run_from_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "a")
    steps: list[Any] = []
    monkeypatch.setattr(
        "pocl_ds.cli.pipeline.run_step_command",
        lambda name, words, run_dir, dry_run: steps.append((name, words, run_dir)) or 0,
    )
    with own_signals():
        assert main(["report", "--run-dir", str(run), "report.max_items=3"]) == 0
        assert main(["report", "quickstart"]) == 0
    assert steps == [("report", ["report.max_items=3"], run), ("report", ["quickstart"], None)]
    other = shutil.copytree(run, tmp_path / "b")
    several = ["--run-dir", str(run), "--run-dir", str(other)]
    with own_signals():
        assert main(["report", *several, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and len(steps) == 2
    for wrong in (
        [*several, "report.max_items=3"],
        [*several, "--dry-run"],
        ["--run-dir", str(run), "--force"],
    ):
        assert "several runs" in sentence(capsys, "report", *wrong)
