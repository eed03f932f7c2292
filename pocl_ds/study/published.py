"""The results of a study beside published ones, with the spread of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from pocl_ds.evaluation.compare_models import MEAN, read_results
from pocl_ds.metrics.bootstrap import Floats
from pocl_ds.runtime.formatting import align_columns
from pocl_ds.study.cells import Cell, PublishedResults, StudyConfig
from pocl_ds.study.run import cell_directory

STUDENT = "student"
DEVIATIONS = {
    "evaluation_seeds": "the evaluation seeds of a training, averaged over trainings",
    "trainings": "trainings",
}


def published_lines(
    folder: Path, study: StudyConfig, finished: Sequence[Cell], benchmarks: Sequence[str]
) -> list[str]:
    """A table of the finished groups that have published values: on each benchmark this study's
    mean and deviation, and the published ones; then their source. Empty without published values.
    """
    published = study.published
    groups = dict.fromkeys(cell.group for cell in finished)
    compared = [group for group in groups if published and group in published.values]
    if not published or not compared:
        return []

    # The mean over benchmarks is the last pair of columns.
    titles = [*benchmarks, MEAN] if len(benchmarks) > 1 else benchmarks
    rows = [["", *(word for title in titles for word in (title, "published"))]]
    for group in compared:
        cells = [cell for cell in finished if cell.group == group]
        scores = _scores_by_seed(folder, cells, benchmarks, study.measure)
        columns = [scores[:, :, number] for number in range(len(benchmarks))]
        values = [published.values[group].get(name) for name in benchmarks]
        if len(benchmarks) > 1:
            columns.append(scores.mean(2))
            values.append(_published_mean(values))
        row = [group]
        for column, value in zip(columns, values, strict=True):
            row += [_mean_and_deviation(column, published), _published_value(value)]
        rows.append(row)

    lines = ["", *align_columns(rows, numbers=True), f"published: {published.source}"]
    lines.append(f"± beside published values: over {DEVIATIONS[published.deviation]}")
    if published.note:
        lines.append(published.note)
    if absent := [group for group in groups if group not in published.values]:
        lines.append(f"no published values: {'; '.join(absent)}")
    return [*lines, ""]


def _scores_by_seed(
    folder: Path, cells: Sequence[Cell], benchmarks: Sequence[str], measure: str
) -> Floats:
    """The scores of one group in percent, [trainings, evaluation seeds, benchmarks]."""
    scores = []
    for cell in cells:
        entries = read_results(cell_directory(folder, cell))["models"][STUDENT]["benchmarks"]
        scores.append([entries[name][f"{measure}_by_seed"] for name in benchmarks])
    return np.array(scores, float).swapaxes(1, 2)


def _mean_and_deviation(scores: Floats, published: PublishedResults) -> str:
    """Mean and deviation of scores, [trainings, evaluation seeds]."""
    deviation = None
    if published.deviation == "trainings" and len(scores) > 1:
        deviation = stdev(scores.mean(1).tolist())
    elif published.deviation == "evaluation_seeds" and scores.shape[1] > 1:
        deviation = fmean(stdev(training) for training in scores.tolist())
    return _value_and_deviation(float(scores.mean()), deviation)


def _published_mean(
    values: Sequence[tuple[float, float | None] | None],
) -> tuple[float, float | None] | None:
    """The mean over benchmarks, whose deviation does not follow from theirs."""
    means = [value[0] for value in values if value is not None]
    return (fmean(means), None) if len(means) == len(values) else None


def _published_value(value: tuple[float, float | None] | None) -> str:
    return "-" if value is None else _value_and_deviation(*value)


def _value_and_deviation(value: float, deviation: float | None) -> str:
    return f"{value:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
