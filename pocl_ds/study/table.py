"""The tables of a study: progress of each cell, means over seeds, and pairs of arms with intervals
over items and trainings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np

from pocl_ds.evaluation.compare_models import (
    MEASURES,
    ComparedModel,
    read_results,
    read_scores,
)
from pocl_ds.metrics.bootstrap import Floats
from pocl_ds.metrics.footnotes import mark_benchmark, merge_footnotes
from pocl_ds.report.history import read_step_costs
from pocl_ds.runtime.formatting import align_columns, format_duration
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.study.cells import Cell, StudyConfig, sample_visits
from pocl_ds.study.differences import (
    Difference,
    detectable_difference,
    holm,
    two_level_difference,
)
from pocl_ds.study.difficulty_agreement import difficulty_lines, read_ranked_samples
from pocl_ds.study.learning_curves import forgetting_lines
from pocl_ds.study.published import published_lines
from pocl_ds.study.run import cell_directory, is_finished
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEPS

STUDENT, ALL_ITEMS = "student", "all items"
ORDERING_STEPS = ("score", "rank", "plan")
MAX_VISIT_RATIO = 1.01  # between arms that count as equal


def progress_lines(folder: Path, study: StudyConfig, cells: Sequence[Cell]) -> list[str]:
    """One line for each cell: its state, and the study's measure once it is finished."""
    rows = [["cell", "visits", "state", MEASURES[study.measure][0]]]
    for cell in cells:
        run, visits = cell_directory(folder, cell), f"{sample_visits(cell.recipe):g}"
        metrics = run.train / "metrics.jsonl"
        if is_finished(folder, cell) and cell.until == "rank":
            rows.append([cell.name, visits, "done", ""])
        elif is_finished(folder, cell):
            models = read_results(run)["models"].get(STUDENT, {"benchmarks": {}})
            scores = ", ".join(
                f"{name} {entry[study.measure]:.2f}" for name, entry in models["benchmarks"].items()
            )
            rows.append([cell.name, visits, "done", scores])
        elif metrics.is_file() and (records := read_metrics(metrics)):
            state = f"step {records[-1]['step']}, loss {records[-1]['loss']:.3f}"
            rows.append([cell.name, visits, state, ""])
        else:
            rows.append([cell.name, visits, "started" if run.recipe.is_file() else "-", ""])
    return align_columns(rows)


def result_lines(folder: Path, study: StudyConfig, cells: Sequence[Cell]) -> list[str]:
    """The results of the finished cells: means over seeds of every group, the study's pairs, and
    warnings. A study of rankings compares the difficulty rankings instead.
    """
    finished = [cell for cell in cells if is_finished(folder, cell)]
    if not finished:
        return []
    if study.until == "rank":
        samples = [
            read_ranked_samples(cell_directory(folder, cell), cell.name) for cell in finished
        ]
        return difficulty_lines(
            samples, max(cell.recipe.curriculum.num_subsets for cell in finished)
        )
    benchmarks = benchmarks_of(folder, finished)
    pairs = read_pairs(folder, study, cells)
    return [
        *_mean_lines(folder, finished, benchmarks, study.measure),
        *published_lines(folder, study, finished, benchmarks),
        *_pair_lines(pairs),
        *forgetting_lines(folder, finished),
        *_unequal_visits(folder, finished, cells),
    ]


def benchmarks_of(folder: Path, finished: Sequence[Cell]) -> list[str]:
    """Names of the benchmarks, which all cells share."""
    results = read_results(cell_directory(folder, finished[0]))
    return list(results["models"][STUDENT]["benchmarks"])


def _mean_lines(
    folder: Path, finished: Sequence[Cell], benchmarks: Sequence[str], measure: str
) -> list[str]:
    """A table of means over seeds, one row for each group of cells, with footnotes."""
    labeled_results = [
        (cell.group, read_results(cell_directory(folder, cell))) for cell in finished
    ]
    header = [
        mark_benchmark(name, *(results for _, results in labeled_results)) for name in benchmarks
    ]
    rows = [["", "trainings", *header, "validation loss", "ordering", "training"]]
    for group in dict.fromkeys(cell.group for cell in finished):
        runs = [cell_directory(folder, cell) for cell in finished if cell.group == group]
        entries = [read_results(run)["models"][STUDENT]["benchmarks"] for run in runs]
        scores = [_mean_and_deviation([e[name][measure] for e in entries]) for name in benchmarks]
        rows.append([group, str(len(runs)), *scores, _validation_loss(runs), *_mean_times(runs)])
    return align_columns(rows, numbers=True) + merge_footnotes(labeled_results, benchmarks)


@dataclass(frozen=True)
class Pair:
    """Two arms at one point of the grid on some items: is the first better than the second?

    differences: paired, [items, trainings].
    """

    label: str
    differences: Floats
    result: Difference


def read_pairs(folder: Path, study: StudyConfig, cells: Sequence[Cell]) -> list[Pair]:
    """The study's pairs of arms at each point of the grid and on each benchmark, as far as both
    arms have finished.
    """
    finished = [cell for cell in cells if is_finished(folder, cell)]
    if not finished:
        return []
    benchmarks = benchmarks_of(folder, finished)
    titles = [*benchmarks, ALL_ITEMS] if len(benchmarks) > 1 else benchmarks
    points = dict.fromkeys(cell.point for cell in cells)
    pairs = []
    for (better, worse), point, title in itertools.product(study.compare, points, titles):
        names = benchmarks if title == ALL_ITEMS else [title]
        differences = _paired_differences(
            folder, finished, (worse, better), point, names, study.measure
        )
        if differences is not None:
            labels = "".join(f", {label}" for _, label in point)
            label = f"{title}{labels}: {better} against {worse}"
            pairs.append(Pair(label, differences, two_level_difference(differences)))
    return pairs


def _pair_lines(pairs: Sequence[Pair]) -> list[str]:
    """A sentence for each pair, and what limits them."""
    tests = [pair for pair in pairs if pair.result.is_test]
    adjusted: dict[str, float] = {}
    if len(tests) > 1:
        corrected = holm([pair.result.p for pair in tests])
        adjusted = {pair.label: p for pair, p in zip(tests, corrected, strict=True)}
    lines = [f"{pair.label}: {pair.result.sentence(adjusted.get(pair.label))}" for pair in pairs]
    if adjusted:
        lines.append(
            f"{len(tests)} comparisons: {0.05 * len(tests):.1f} of them would show a difference "
            "between equal arms by chance; p by Holm accounts for that"
        )
    if tests:
        counts = {trainings: _detectable(tests, trainings) for trainings in (3, 5, 10, 20)}
        listed = ", ".join(f"{value:.2f} with {count}" for count, value in counts.items())
        lines.append(
            f"on {tests[0].result.items} items a study shows a difference with a probability of "
            f"80% from {listed} trainings on (median over the pairs)"
        )
    if any(pair.result.trainings == 1 for pair in pairs):
        lines.append(
            "with one training each, an interval covers items alone and not how much trainings "
            "differ"
        )
    return lines


def _detectable(tests: Sequence[Pair], trainings: int) -> float:
    return median(detectable_difference(pair.differences, trainings) for pair in tests)


def _unequal_visits(folder: Path, finished: Sequence[Cell], cells: Sequence[Cell]) -> list[str]:
    """A warning if arms visit samples unequally often: by the plans of finished cells, whose stages
    drop incomplete batches, else by their recipes.
    """
    plans = {
        cell.group: read_json(cell_directory(folder, cell).plan / "plan.json") for cell in finished
    }
    visits = {
        group: plan["total_steps"] * plan["batch_size"] / plan["samples"]
        for group, plan in plans.items()
    }
    if max(visits.values()) > MAX_VISIT_RATIO * min(visits.values()):
        counts = ", ".join(f"{value:.2f} times by {group}" for group, value in visits.items())
        return [f"NOT EQUAL: a sample is visited on average {counts}"]
    planned = sorted({sample_visits(cell.recipe) for cell in cells})
    if len(planned) > 1:
        return [
            f"NOT EQUAL: cells visit a sample {', '.join(f'{value:g}' for value in planned)} times"
        ]
    return []


def _paired_differences(
    folder: Path,
    finished: Sequence[Cell],
    arms: tuple[str, str],
    point: tuple[tuple[str, str], ...],
    benchmarks: Sequence[str],
    measure: str,
) -> Floats | None:
    """The second arm minus the first, [items, trainings], over all items of some benchmarks and the
    seeds that both have finished; None without such a seed.
    """
    # Find the seeds that both arms have finished.
    sides = [
        {cell.seed: cell for cell in finished if cell.arm == arm and cell.point == point}
        for arm in arms
    ]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None

    # One column for each seed: the differences of all common items.
    columns = []
    for seed in seeds:
        differences: list[float] = []
        for benchmark in benchmarks:
            scores_a, scores_b = (
                read_scores(
                    ComparedModel(cell_directory(folder, side[seed]), STUDENT, side[seed].name),
                    benchmark,
                    measure,
                ).scores
                for side in sides
            )
            differences += [
                fmean(scores_b[item]) - fmean(scores)
                for item, scores in scores_a.items()
                if item in scores_b
            ]
        columns.append(np.array(differences))
    return np.stack(columns, 1)


def _validation_loss(runs: Sequence[RunDirectory]) -> str:
    """Final cross-entropy per token on the validation samples, which are the same in all arms. It
    is finer than ROUGE-L if students are weak.
    """
    losses = [
        records[-1]["validation_loss"]
        for run in runs
        if (records := read_metrics(run.train / "metrics.jsonl", "validation"))
    ]
    return _mean_and_deviation(losses) if len(losses) == len(runs) else "-"


def _mean_times(runs: Sequence[RunDirectory]) -> tuple[str, str]:
    """Mean times of ordering the samples (score, rank, plan) and of training. Reused results count
    as if they had been computed.
    """
    times = []
    for run in runs:
        manifests = {
            step.name: manifest
            for step in STEPS
            if (manifest := read_manifest(step.directory(run)))
        }
        times.append({cost.step: cost.seconds for cost in read_step_costs(run, manifests)})
    ordering = [sum(seconds.get(step, 0.0) for step in ORDERING_STEPS) for seconds in times]
    training = [seconds.get("train", 0.0) for seconds in times]
    return format_duration(fmean(ordering)), format_duration(fmean(training))


def _mean_and_deviation(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
