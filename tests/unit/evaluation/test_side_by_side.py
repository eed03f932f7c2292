"""Runs side by side: joined by id, refused where they are not alike, marked where that is forced;
the command itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocl_ds.cli.main import main
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.evaluation.answers import answers_file
from pocl_ds.evaluation.side_by_side import Side, lines_of, put_side_by_side
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

SETTINGS = {
    "template": "alpaca",
    "max_prompt_tokens": 256,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 256,
}
Written = Callable[..., RunDirectory]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Makes a run with answers: model -> benchmark -> {id: score}, the same for each seed but for a
    little noise.
    """

    def make(
        name: str,
        models: dict[str, dict[str, dict[str, float]]],
        *,
        settings: dict[str, Any] | None = None,
        backwards: bool = False,
        question: str = "Q",
        seeds: tuple[int, ...] = (10, 20),
    ) -> RunDirectory:
        run = RunDirectory(tmp_path / name)
        for model, benchmarks in models.items():
            for benchmark, scores in benchmarks.items():
                for seed in seeds:
                    file = answers_file(run, model, benchmark, seed)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    items = sorted(scores.items(), reverse=backwards)
                    file.write_text(
                        "".join(
                            json.dumps(
                                {
                                    "id": key,
                                    "instruction": f"{question} {key}",
                                    "input": "",
                                    "references": ["r"],
                                    "response": "x",
                                    "rouge_l": score + (seed - 15) / 1000,
                                    "exact_match": score > 0.5,
                                }
                            )
                            + "\n"
                            for key, score in items
                        )
                    )
                    write_manifest(
                        file.parent,
                        "answers",
                        "f",
                        files=[file],
                        name=f"{file.name}.manifest.json",
                        info={"settings": {**SETTINGS, **(settings or {})}, "seconds": 1.0},
                    )
        results = {
            model: {"benchmarks": dict.fromkeys(benchmarks)} for model, benchmarks in models.items()
        }
        write_json(run.evaluation / "results.json", {"seeds": list(seeds), "models": results})
        return run

    return make


def scores(shift: float, items: int = 60, seed: int = 0) -> dict[str, float]:
    values = np.random.default_rng(seed).uniform(0.1, 0.6, items) + shift
    return {f"q{i}": float(value) for i, value in enumerate(values)}


def test_items_are_joined_by_id(written: Written) -> None:
    a = written("a", {"student": {"dolly": scores(0)}})
    b = written("b", {"student": {"dolly": scores(0.05)}}, backwards=True)
    table = put_side_by_side(Side(a, "student", "A"), Side(b, "student", "B"))
    found = table.comparisons["dolly"]
    assert found.difference == pytest.approx(5) and found.half_width == pytest.approx(
        0, abs=1e-9
    )  # 5 on every item
    assert found.items == 60 and found.deviation_a == pytest.approx(1 / 2**0.5) and not table.marks


def test_within_one_run_and_over_benchmarks(
    written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(
        "r",
        {
            "baseline": {"dolly": scores(0), "sni": scores(0.1, 30, 1)},
            "student": {"dolly": scores(0.02), "sni": scores(0.14, 30, 1)},
        },
    )
    assert main(["compare", "--run-dir", str(run.path), "--models", "baseline", "student"]) == 0
    said = capsys.readouterr().out
    assert "dolly: student better than baseline by 2.00 ± 0.00 ROUGE-L, p < 0.001" in said
    assert (
        "mean of all: student better than baseline by 3.00" in said and "NOT COMPARABLE" not in said
    )
    assert (
        main(
            ["compare", "--run-dir", str(run.path), "--models", "student", "baseline"]
            + ["--benchmark", "sni"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "sni: baseline worse than student by 4.00" in said and "dolly" not in said


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"settings": {"template": "chat"}}, "template differs (alpaca and chat)"),
        ({"settings": {"temperature": 0.7}}, "temperature"),
        ({"settings": {"max_new_tokens": 64}}, "max_new_tokens"),
        ({"question": "Other"}, "60 items of the same id"),
    ],
)
def test_other_conditions_are_refused_unless_forced(
    change: dict[str, Any], word: str, written: Written
) -> None:
    a = Side(written("a", {"student": {"dolly": scores(0)}}), "student", "A")
    b = Side(written("b", {"student": {"dolly": scores(0.05)}}, **change), "student", "B")
    with pytest.raises(ArtifactError, match="--force") as caught:
        put_side_by_side(a, b)
    assert word in str(caught.value)
    table = put_side_by_side(a, b, force=True)
    assert len(table.marks) == 1 and word in table.marks[0]
    assert any(line.startswith("NOT COMPARABLE") and word in line for line in lines_of(table, a, b))


def test_what_there_is_to_say_of_a_benchmark_is_said_of_its_side(written: Written) -> None:
    a, b = (
        Side(
            written(name, {"student": {"dolly": scores(0), "sni": scores(0)}}),
            "student",
            name.upper(),
        )
        for name in "ab"
    )
    for side, more in ((a, {}), (b, {"sni": ["1 of 60 items seen in training"]})):
        path = side.run.evaluation / "results.json"
        write_json(
            path,
            {**json.loads(path.read_text()), "marks": {"dolly": ["2 of 60 prompts cut"], **more}},
        )
    lines = [line for line in lines_of(put_side_by_side(a, b), a, b) if line.startswith("⚠")]
    assert lines == ["⚠ dolly: 2 of 60 prompts cut", "⚠ sni: 1 of 60 items seen in training (B)"]
    lines = lines_of(put_side_by_side(a, b, benchmark="sni"), a, b)
    assert [line for line in lines if line.startswith("⚠")] == [
        "⚠ sni: 1 of 60 items seen in training (B)"
    ]


def test_other_items_are_refused_and_with_force_the_common_ones_remain(written: Written) -> None:
    few = {key: value for key, value in scores(0.05).items() if int(key[1:]) < 40}
    a = Side(written("a", {"student": {"dolly": scores(0)}}), "student", "A")
    b = Side(written("b", {"student": {"dolly": few}}), "student", "B")
    with pytest.raises(ArtifactError, match=r"the items differ \(20 and 0"):
        put_side_by_side(a, b)
    assert put_side_by_side(a, b, force=True).comparisons["dolly"].items == 40


def test_what_is_not_there(written: Written, tmp_path: Path) -> None:
    a = Side(written("a", {"student": {"dolly": scores(0)}}), "student", "A")
    b = Side(written("b", {"student": {"sni": scores(0)}}), "student", "B")
    with pytest.raises(ArtifactError, match="no benchmark in common"):
        put_side_by_side(a, b)
    with pytest.raises(RecipeError, match="no results of 'teacher'"):
        put_side_by_side(a, Side(b.run, "teacher", "B"))
    with pytest.raises(RecipeError, match="--benchmark sni"):
        put_side_by_side(a, a, benchmark="sni")
    with pytest.raises(ArtifactError, match="no finished evaluation"):
        put_side_by_side(a, Side(RunDirectory(tmp_path), "student", "B"))
    with pytest.raises(ArtifactError, match=r"holds no verdicts on dolly"):
        put_side_by_side(a, a, measure="judge")
    with pytest.raises(RecipeError, match="no measure"):
        put_side_by_side(a, a, measure="bleu")
    file = answers_file(a.run, "student", "dolly", 20)
    (file.parent / f"{file.name}.manifest.json").unlink()
    with pytest.raises(ArtifactError, match="missing or unfinished"):
        put_side_by_side(a, a)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["r"], "--models baseline student"),
        (["r", "r"], "compared with itself"),
        (["r", "r", "r"], "two at a time"),
        (["none", "r"], "not a run directory"),
    ],
)
def test_what_the_command_line_may_say(
    words: list[str],
    said: str,
    written: Written,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written("r", {"student": {"dolly": scores(0)}})
    assert main(["compare", *(f"--run-dir={tmp_path / word}" for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
