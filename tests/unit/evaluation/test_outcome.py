"""What a distillation changed, in a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocl_ds.evaluation.answers import HELD_OUT_LOSS, answers_file
from pocl_ds.evaluation.outcome import outcome_lines
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

SAMPLES = 60


def write_model(run: RunDirectory, model: str, rouge_l: np.ndarray) -> None:
    file = answers_file(run, model, "test", 1)
    file.parent.mkdir(parents=True)
    records = [{"id": f"s{i}", "rouge_l": float(value)} for i, value in enumerate(rouge_l)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_manifest(file.parent, "answers", "x", files=[file], name=f"{file.name}.manifest.json")


def write_run(folder: Path, models: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    """A run whose models have these means of loss, KL and ROUGE-L, with some noise."""
    run, source = RunDirectory(folder), np.random.default_rng(0)
    tokens = source.integers(3, 12, SAMPLES)
    noise = source.normal(0, 0.2, SAMPLES)
    losses = {}
    for model, (loss, kl, rouge_l) in models.items():
        own = source.normal(0, 0.05, SAMPLES)
        losses[model] = {
            "loss": loss,
            "kl": kl,
            "samples": {
                "ids": [f"s{i}" for i in range(SAMPLES)],
                "tokens": tokens.tolist(),
                "loss": (tokens * (loss + noise + own)).tolist(),
                "kl": (tokens * (kl + noise + own)).tolist(),
            },
        }
        write_model(run, model, np.clip(rouge_l + noise + own, 0, 1))
    write_json(run.evaluation / HELD_OUT_LOSS, losses)
    entry: dict[str, Any] = {"benchmarks": {"test": {}}}
    return {"seeds": [1], "models": dict.fromkeys(models, entry)}


def test_the_student_is_compared_with_the_others(tmp_path: Path) -> None:
    models = {
        "initial": (2.0, 1.0, 0.3),
        "student": (1.5, 0.6, 0.6),
        "baseline": (1.3, 0.6, 0.6),
    }
    results = write_run(tmp_path, models)
    before, numbers, sentence, baseline, _, other = outcome_lines(RunDirectory(tmp_path), results)
    assert before == "student after minus student before, with 95% intervals over 60 samples:"
    loss, kl, rouge_l = numbers.strip().split("   ")
    assert loss.startswith("loss/token -0.5") and kl.startswith("KL to teacher -0.4")
    assert rouge_l.startswith("ROUGE-L +") and "(" in rouge_l
    assert sentence == (
        "Against the student before, the student after is better by loss/token and KL to teacher "
        "and ROUGE-L."
    )
    assert baseline.startswith("student after minus student after plain KD")
    assert other == (
        "Against the student after plain KD, the student after is worse by loss/token, not shown "
        "to differ by KL to teacher and ROUGE-L."
    )


def test_without_losses_of_the_test_split_there_is_no_outcome(tmp_path: Path) -> None:
    results = write_run(tmp_path, {"initial": (2.0, 1.0, 0.3), "student": (1.5, 0.6, 0.6)})
    run = RunDirectory(tmp_path)
    del results["models"]["initial"]
    assert outcome_lines(run, results) == []
    (run.evaluation / HELD_OUT_LOSS).unlink()
    assert outcome_lines(run, results) == []


def test_few_samples_are_called_too_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SAMPLES", 10)
    results = write_run(tmp_path, {"initial": (2.0, 1.0, 0.3), "student": (1.5, 0.6, 0.6)})
    lines = outcome_lines(RunDirectory(tmp_path), results)
    assert lines[-1].endswith("10 samples are too few to tell.") and "better" not in lines[-1]
