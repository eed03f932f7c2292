"""Answers that are right or wrong: numbers, and code with tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from answer_generation import generate
from typer.testing import CliRunner

from pocl_ds.cli.main import app
from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.errors import ArtifactError, DataError, ResourceError
from pocl_ds.evaluation import code_sandbox, verification
from pocl_ds.evaluation.answers import answers_file
from pocl_ds.evaluation.compare_models import ComparedModel, compare_models
from pocl_ds.evaluation.evaluate import summarize_results
from pocl_ds.evaluation.tables import table_rows
from pocl_ds.evaluation.verification import (
    check_references,
    check_sandboxed_benchmarks,
    code_of,
    number_fault,
    read_verification,
    summarize_verification,
    verification_file,
    verify_answers,
)
from pocl_ds.metrics.numbers import last_number
from pocl_ds.report.formatting import results_rows
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def config_of(kind: str | None, source: str = "test", **fields: Any) -> EvaluateConfig:
    benchmarks = {"mine": {"source": source, "verify": kind}}
    settings = {"generation": {"backend": "transformers"}, "seeds": [1, 2], **fields}
    return EvaluateConfig.model_validate({"benchmarks": benchmarks, **settings})


def write_answers(run: RunDirectory, model: str, seed: int, records: list[dict[str, Any]]) -> None:
    file = answers_file(run, model, "mine", seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_manifest(file.parent, "answers", "x", files=[file], name=f"{file.name}.manifest.json")


def answer(item: str, response: str, *references: str, **fields: Any) -> dict[str, Any]:
    return {"id": item, "response": response, "references": list(references), **fields}


def test_a_number_is_compared_with_those_of_the_references() -> None:
    assert number_fault("It is 1,250.0.", ["#### 1250"]) is None
    assert number_fault("It is 7", ["8", "so 7"]) is None
    assert number_fault("It is 7 or 9", ["7"]) == "another number (9)"
    assert number_fault("I do not know", ["7"]) == "no number"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\ndef f():\n    pass\n```\nIt works.", "def f():\n    pass\n"),
        ("```\na\n```\n```py\ndef f(): pass\n```", "def f(): pass\n"),  # the longest block
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("```python\nx = 1", "x = 1"),  # cut by max_new_tokens
        ("Use `x` and ```y``` here", "Use `x` and ```y``` here"),
    ],
)
def test_the_code_of_an_answer_is_its_longest_block(text: str, code: str) -> None:
    assert code_of(text) == code


def test_verified_answers_of_a_model(
    run: RunDirectory, prompt: PromptConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """From the answers of tiny models to results, tables and a comparison."""
    config = config_of("number", max_new_tokens=8, held_out_loss=False, max_samples=6)
    models = ["initial", "student"]
    for model in models:
        generate(run, config, prompt, model)
    with pytest.raises(ArtifactError, match="verify"):
        summarize_results(run, config, models)
    caplog.set_level("INFO", "pocl_ds")
    verify_answers(run, config, models)
    assert "verify student mine seed=2: " in caplog.text
    results = summarize_results(run, config, models, fingerprint="f" * 64)

    for model in models:
        shares = []
        for seed in (1, 2):
            lines = answers_file(run, model, "mine", seed).read_text().splitlines()
            expected = {
                record["id"]: last_number(record["response"])
                == last_number(record["references"][0])
                for record in map(json.loads, lines)
            }
            assert read_verification(verification_file(run, model, "mine", seed)) == expected
            shares.append(100 * sum(expected.values()) / len(expected))
        entry = results["models"][model]["benchmarks"]["mine"]
        assert entry["correct_by_seed"] == shares
        assert entry["correct"] == pytest.approx(sum(shares) / 2)
    files = read_json(run.evaluation / "manifest.json")["files"]
    assert "student/verified/mine-seed2.jsonl" in files
    assert "% correct mine" in table_rows(results)[0]
    assert "correct (%), mine" in results_rows(results)[0]

    pair = [ComparedModel(run, model, model) for model in models]
    comparison = compare_models(*pair, measure="correct").comparisons["mine"]
    assert comparison.mean_a == pytest.approx(
        results["models"]["initial"]["benchmarks"]["mine"]["correct"]
    )
    arguments = ["compare", "--run-dir", str(run.path), "--models", *models, "--measure", "correct"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "% correct" in result.output


def test_verdicts_are_reused_until_the_answers_change(run: RunDirectory) -> None:
    config = config_of("number")
    for seed in (1, 2):
        write_answers(run, "student", seed, [answer("a", "7", "7"), answer("b", "8", "9")])
    verify_answers(run, config, ["student"])
    file = verification_file(run, "student", "mine", 1)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"id": "a", "correct": True, "fault": None},
        {"id": "b", "correct": False, "fault": "another number (8)"},
    ]
    assert summarize_verification(run, config, "student", "mine")["correct"] == 50
    one_seed = summarize_verification(run, config_of("number", seeds=[1]), "student", "mine")
    assert one_seed["correct_deviation"] is None
    before = file.stat().st_mtime_ns
    verify_answers(run, config, ["student"])
    assert file.stat().st_mtime_ns == before
    write_answers(run, "student", 1, [answer("a", "7", "7"), answer("b", "9", "9")])
    verify_answers(run, config, ["student"])
    summary = summarize_verification(run, config, "student", "mine")
    assert summary["correct_by_seed"] == [100, 50]
    assert summary["correct_deviation"] == pytest.approx(50 / 2**0.5)
    file.write_text(file.read_text()[:-10])  # damaged
    with pytest.raises(ArtifactError, match="damaged"):
        read_verification(file)
    verify_answers(run, config, ["student"])
    assert read_verification(file) == {"a": True, "b": True}


def test_the_answer_after_a_thought_is_verified(run: RunDirectory) -> None:
    record = answer(
        "a", "<think>8</think>7, or 9", "<think>5</think>7", answer="7", reference_answers=["7"]
    )
    for seed in (1, 2):
        write_answers(run, "student", seed, [record])
    verify_answers(run, config_of("number", span="answer"), ["student"])
    assert read_verification(verification_file(run, "student", "mine", 1)) == {"a": True}


def test_code_passes_its_tests(run: RunDirectory) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    tests = ["assert add(2, 3) == 5", "assert add(1, -1) == 0"]
    records = [
        answer("right", "Sure:\n```python\ndef add(a, b):\n    return a + b\n```", *tests),
        answer("one of two", "def add(a, b): return 5 if a == 2 else 1", *tests),
        answer("text", "I cannot", *tests),
    ]
    for seed in (1, 2):
        write_answers(run, "student", seed, records)
    verify_answers(run, config_of("code"), ["student"])
    verified = read_verification(verification_file(run, "student", "mine", 1))
    assert verified == {"right": True, "one of two": False, "text": False}
    manifest = read_json(run.evaluation / "student/verified/mine-seed1.jsonl.manifest.json")
    assert manifest["info"]["faults"] == {"failed": 1, "not valid Python": 1}


def test_what_cannot_be_verified_is_an_error(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sample.from_instruction("a", "How many?", "seven")
    with pytest.raises(DataError, match=r"benchmark mine, sample a: .*'seven' has no number"):
        check_references(config_of("number"), "mine", [sample])
    thought = Sample.from_instruction("a", "How many?", "<think>7</think>seven")
    check_references(config_of("number"), "mine", [thought])
    with pytest.raises(DataError, match="has no number"):
        check_references(config_of("number", span="answer"), "mine", [thought])
    check_references(config_of("code"), "mine", [sample])
    check_references(config_of(None), "mine", [sample])
    code_sandbox.check_sandbox.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ResourceError, match="bubblewrap"):
        check_sandboxed_benchmarks(config_of("code"))
    check_sandboxed_benchmarks(config_of("number"))


def test_a_benchmark_that_is_not_verified_has_no_such_measure(run: RunDirectory) -> None:
    assert summarize_verification(run, config_of(None), "student", "mine") == {}
    verify_answers(run, config_of(None), ["student"])
    assert not Path(verification.verification_file(run, "student", "mine", 1)).exists()
