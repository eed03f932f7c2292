"""Comparison of two models: items are joined by id, and different settings are an error unless
forced; the command `pocl compare`.
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
from pocl_ds.evaluation.compare_models import ComparedModel, compare_models, comparison_lines
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
MakeRun = Callable[..., RunDirectory]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a run with answers: model -> benchmark -> {id: score}, with a small offset per seed."""

    def make(
        name: str,
        models: dict[str, dict[str, dict[str, float]]],
        *,
        settings: dict[str, Any] | None = None,
        reverse: bool = False,
        instruction: str = "Q",
        seeds: tuple[int, ...] = (10, 20),
    ) -> RunDirectory:
        run = RunDirectory(tmp_path / name)
        for model, benchmarks in models.items():
            for benchmark, scores in benchmarks.items():
                for seed in seeds:
                    file = answers_file(run, model, benchmark, seed)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    items = sorted(scores.items(), reverse=reverse)
                    file.write_text(
                        "".join(
                            json.dumps(
                                {
                                    "id": key,
                                    "instruction": f"{instruction} {key}",
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


def test_items_are_joined_by_id(make_run: MakeRun) -> None:
    a = make_run("a", {"student": {"dolly": scores(0)}})
    b = make_run("b", {"student": {"dolly": scores(0.05)}}, reverse=True)
    comparison = compare_models(ComparedModel(a, "student", "A"), ComparedModel(b, "student", "B"))
    dolly = comparison.comparisons["dolly"]
    assert dolly.difference == pytest.approx(5) and dolly.half_width == pytest.approx(
        0, abs=1e-9
    )  # 5 on every item
    assert (
        dolly.items == 60
        and dolly.deviation_a == pytest.approx(1 / 2**0.5)
        and not comparison.differences
    )


def test_the_command_compares_two_models_of_one_run(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(
        "r",
        {
            "baseline": {"dolly": scores(0), "sni": scores(0.1, 30, 1)},
            "student": {"dolly": scores(0.02), "sni": scores(0.14, 30, 1)},
        },
    )
    assert main(["compare", "--run-dir", str(run.path), "--models", "baseline", "student"]) == 0
    output = capsys.readouterr().out
    assert "dolly: student is better than baseline by 2.00 ± 0.00 ROUGE-L, p < 0.001" in output
    assert (
        "mean of all: student is better than baseline by 3.00" in output
        and "NOT COMPARABLE" not in output
    )
    assert (
        main(
            ["compare", "--run-dir", str(run.path), "--models", "student", "baseline"]
            + ["--benchmark", "sni"]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "sni: baseline is worse than student by 4.00" in output and "dolly" not in output


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"settings": {"template": "chat"}}, "template differs (alpaca and chat)"),
        ({"settings": {"temperature": 0.7}}, "temperature"),
        ({"settings": {"max_new_tokens": 64}}, "max_new_tokens"),
        ({"instruction": "Other"}, "60 items with the same id"),
    ],
)
def test_different_settings_are_an_error_unless_forced(
    change: dict[str, Any], word: str, make_run: MakeRun
) -> None:
    a = ComparedModel(make_run("a", {"student": {"dolly": scores(0)}}), "student", "A")
    b = ComparedModel(make_run("b", {"student": {"dolly": scores(0.05)}}, **change), "student", "B")
    with pytest.raises(ArtifactError, match="--force") as exc_info:
        compare_models(a, b)
    assert word in str(exc_info.value)
    comparison = compare_models(a, b, force=True)
    assert len(comparison.differences) == 1 and word in comparison.differences[0]
    assert any(
        line.startswith("NOT COMPARABLE") and word in line
        for line in comparison_lines(comparison, a, b)
    )


def test_footnotes_name_the_model_that_they_belong_to(make_run: MakeRun) -> None:
    a, b = (
        ComparedModel(
            make_run(name, {"student": {"dolly": scores(0), "sni": scores(0)}}),
            "student",
            name.upper(),
        )
        for name in "ab"
    )
    for model, other_notes in ((a, {}), (b, {"sni": ["1 of 60 items seen in training"]})):
        path = model.run.evaluation / "results.json"
        write_json(
            path,
            {
                **json.loads(path.read_text()),
                "footnotes": {"dolly": ["2 of 60 prompts cut"], **other_notes},
            },
        )
    lines = [line for line in comparison_lines(compare_models(a, b), a, b) if line.startswith("⚠")]
    assert lines == ["⚠ dolly: 2 of 60 prompts cut", "⚠ sni: 1 of 60 items seen in training (B)"]
    lines = comparison_lines(compare_models(a, b, benchmark="sni"), a, b)
    assert [line for line in lines if line.startswith("⚠")] == [
        "⚠ sni: 1 of 60 items seen in training (B)"
    ]


def test_different_items_are_an_error_and_force_uses_the_common_ones(make_run: MakeRun) -> None:
    common = {key: value for key, value in scores(0.05).items() if int(key[1:]) < 40}
    a = ComparedModel(make_run("a", {"student": {"dolly": scores(0)}}), "student", "A")
    b = ComparedModel(make_run("b", {"student": {"dolly": common}}), "student", "B")
    with pytest.raises(ArtifactError, match=r"the items differ \(20 only of the first, 0"):
        compare_models(a, b)
    assert compare_models(a, b, force=True).comparisons["dolly"].items == 40


def test_missing_results_are_errors(make_run: MakeRun, tmp_path: Path) -> None:
    a = ComparedModel(make_run("a", {"student": {"dolly": scores(0)}}), "student", "A")
    b = ComparedModel(make_run("b", {"student": {"sni": scores(0)}}), "student", "B")
    with pytest.raises(ArtifactError, match="no benchmark in common"):
        compare_models(a, b)
    with pytest.raises(RecipeError, match="no results of 'teacher'"):
        compare_models(a, ComparedModel(b.run, "teacher", "B"))
    with pytest.raises(RecipeError, match="--benchmark sni"):
        compare_models(a, a, benchmark="sni")
    with pytest.raises(ArtifactError, match="no finished evaluation"):
        compare_models(a, ComparedModel(RunDirectory(tmp_path), "student", "B"))
    with pytest.raises(ArtifactError, match=r"holds no verdicts on dolly"):
        compare_models(a, a, measure="judge")
    with pytest.raises(RecipeError, match="no measure"):
        compare_models(a, a, measure="bleu")
    file = answers_file(a.run, "student", "dolly", 20)
    (file.parent / f"{file.name}.manifest.json").unlink()
    with pytest.raises(ArtifactError, match="missing, unfinished or damaged"):
        compare_models(a, a)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["r"], "--models baseline student"),
        (["r", "r"], "compared with itself"),
        (["r", "r", "r"], "two at a time"),
        (["none", "r"], "not a run directory"),
    ],
)
def test_invalid_command_lines_are_one_sentence(
    names: list[str],
    message: str,
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("r", {"student": {"dolly": scores(0)}})
    assert main(["compare", *(f"--run-dir={tmp_path / name}" for name in names)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
