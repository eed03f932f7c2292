"""What a distillation changed on the test split, by loss, KL to the teacher, correct answers where
they are verified, and ROUGE-L: the student after it compared with the one before it, and with the
baseline.

The intervals are those of `comparison`: a paired bootstrap over the samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocl_ds.evaluation.answers import HELD_OUT_LOSS, answers_file, read_answers
from pocl_ds.evaluation.comparison import MIN_ITEMS, Comparison, compare_ratios, compare_scores
from pocl_ds.evaluation.tables import LABELS
from pocl_ds.evaluation.verification import read_verification, verification_file
from pocl_ds.metrics.bootstrap import Floats
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.run_dir import RunDirectory

TEST = "test"  # the benchmark of the test split
# Name of each measure, and the sign of an improvement.
MEASURES = {"loss/token": -1, "KL to teacher": -1, "% correct": 1, "ROUGE-L": 1}


def outcome_lines(run: RunDirectory, results: dict[str, Any]) -> list[str]:
    """The differences of the student from the other students, and a sentence on what they mean.
    Empty if the results lack the student before distillation or the losses of the test split.

    results: the content of results.json. Raises ArtifactError for damaged answers.
    """
    path = run.evaluation / HELD_OUT_LOSS
    losses = read_json(path) if path.is_file() else {}
    if not all("samples" in losses.get(model, {}) for model in ("initial", "student")):
        return []
    compared = [model for model in ("initial", "baseline") if model in results["models"]]
    lines = []
    for other in compared:
        changes = _compare(run, results, losses, other)
        items = next(iter(changes.values())).items
        lines += [
            f"{LABELS['student']} minus {LABELS[other]}, with 95% intervals over {items} samples:",
            "  " + "   ".join(f"{name} {_format(change)}" for name, change in changes.items()),
            _sentence(changes, other),
        ]
    return lines


def _compare(
    run: RunDirectory, results: dict[str, Any], losses: dict[str, Any], other: str
) -> dict[str, Comparison]:
    before, after = losses[other]["samples"], losses["student"]["samples"]
    tokens = np.array(after["tokens"], float)
    changes = {}
    for name, key in (("loss/token", "loss"), ("KL to teacher", "kl")):
        if key in losses["student"]:
            a, b = (np.array(entry[key], float) for entry in (before, after))
            changes[name] = compare_ratios(a, b, tokens)
    models, seeds = (other, "student"), results["seeds"]
    entries = [results["models"][model]["benchmarks"].get(TEST) for model in models]
    if all(entry and "correct" in entry for entry in entries):
        shares = [_correct(run, model, seeds) for model in models]
        changes["% correct"] = compare_scores(shares[0], shares[1])
    if all(entry is not None for entry in entries):
        scores = [_rouge_l(run, model, seeds) for model in models]
        changes["ROUGE-L"] = compare_scores(scores[0], scores[1])
    return changes


def _correct(run: RunDirectory, model: str, seeds: list[int]) -> Floats:
    """100 for each correct answer, by sample and seed: [n, s]."""
    columns = []
    for seed in seeds:
        verified = read_verification(verification_file(run, model, TEST, seed))
        columns.append([100.0 * verified[name] for name in sorted(verified)])
    return np.array(columns).T


def _rouge_l(run: RunDirectory, model: str, seeds: list[int]) -> Floats:
    """ROUGE-L in percent of each answer, by sample and seed: [n, s]."""
    columns = []
    for seed in seeds:
        answers = {a["id"]: a for a in read_answers(answers_file(run, model, TEST, seed))}
        columns.append([100 * answers[name]["rouge_l"] for name in sorted(answers)])
    return np.array(columns).T


def _format(change: Comparison) -> str:
    return f"{change.difference:+.3f} ({change.low:+.3f}..{change.high:+.3f})"


def _sentence(changes: dict[str, Comparison], other: str) -> str:
    """Where the student is better, worse, or not shown to be either."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not shown to differ": []}
    for name, change in changes.items():
        if not change.is_significant:
            groups["not shown to differ"].append(name)
        else:
            groups["better" if change.difference * MEASURES[name] > 0 else "worse"].append(name)
    parts = [f"{word} by {' and '.join(names)}" for word, names in groups.items() if names]
    few = next(iter(changes.values())).items
    note = f"; {few} samples are too few to tell" if few < MIN_ITEMS else ""
    return f"Against the {LABELS[other]}, the {LABELS['student']} is {', '.join(parts)}{note}."
