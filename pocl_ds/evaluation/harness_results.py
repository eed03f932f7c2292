"""The results of standard tasks (see `harness`): their files, and a table with paired differences.

A model's file is `evaluation/harness/MODEL.json`, {task: {"means": {metric: mean}, "values":
{metric: {document: value}}}}. Metrics have the names of lm-evaluation-harness, such as
`exact_match,strict-match`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.evaluation.comparison import Comparison, compare_scores
from pocl_ds.evaluation.tables import LABELS
from pocl_ds.runtime.formatting import align_columns
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.run_dir import RunDirectory

HarnessResults = dict[str, Any]  # of one model


def harness_file(run: RunDirectory, model: str) -> Path:
    """Where the results of a model are."""
    return run.evaluation / "harness" / f"{model}.json"


def read_harness_results(run: RunDirectory, model: str) -> HarnessResults:
    """The results of a model; empty if there are none."""
    file = harness_file(run, model)
    return read_json(file) if file.is_file() else {}


def harness_lines(run: RunDirectory, results: dict[str, Any]) -> list[str]:
    """A table of the standard tasks, in percent, and the differences of the student from the other
    models. Empty without `evaluate.harness`.
    """
    entries = {
        name: entry["harness"] for name, entry in results["models"].items() if "harness" in entry
    }
    if not entries:
        return []
    columns = [(task, m) for task, means in next(iter(entries.values())).items() for m in means]
    rows = [["", *(f"{task} {metric.removesuffix(',none')}" for task, metric in columns)]]
    for model in (name for name in LABELS if name in entries):
        means = [entries[model].get(task, {}).get(metric) for task, metric in columns]
        rows.append([LABELS[model], *("–" if m is None else f"{100 * m:.2f}" for m in means)])
    lines = align_columns(rows, numbers=True)
    if "student" not in entries:
        return lines
    student = read_harness_results(run, "student")
    for other in (name for name in entries if name != "student"):
        before = read_harness_results(run, other)
        for task, metric in columns:
            if (change := _compare_tasks(before, student, task, metric)) is not None:
                interval = f"({change.low:+.2f}..{change.high:+.2f})"
                lines.append(
                    f"{task} {metric.removesuffix(',none')}: {LABELS['student']} minus "
                    f"{LABELS[other]} {change.difference:+.2f} {interval}"
                )
    return lines


def _compare_tasks(
    before: HarnessResults, after: HarnessResults, task: str, metric: str
) -> Comparison | None:
    """Two models compared on the documents of a task, in percent; None if its metric has no value
    of each document, or there are fewer than two.
    """
    values = [
        results.get(task, {"values": {}})["values"].get(metric, {}) for results in (before, after)
    ]
    documents = sorted(values[0].keys() & values[1].keys())
    if len(documents) < 2:
        return None
    a, b = (np.array([[100 * v[document]] for document in documents], float) for v in values)
    return compare_scores(a, b)
