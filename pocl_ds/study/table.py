"""The tables of a study: progress of each cell, means over seeds, and pairs of arms with intervals
over items and trainings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from pocl_ds.evaluation.compare_models import ComparedModel, read_results, read_scores
from pocl_ds.evaluation.comparison import MIN_ITEMS
from pocl_ds.metrics.bootstrap import (
    RESAMPLES,
    Floats,
    percentile_interval,
    resampled_means,
    two_sided_p,
)
from pocl_ds.metrics.footnotes import mark_benchmark, merge_footnotes
from pocl_ds.report.history import read_step_costs
from pocl_ds.runtime.formatting import align_columns, format_duration
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.study.cells import Cell, StudyConfig, sample_visits
from pocl_ds.study.difficulty_agreement import difficulty_lines, read_ranked_samples
from pocl_ds.study.run import cell_directory, is_finished
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEPS

STUDENT, MEASURE, ALL_ITEMS = "student", "rouge_l", "all items"
ORDERING_STEPS = ("score", "rank", "plan")
MAX_VISIT_RATIO = 1.01  # between arms that count as equal


@dataclass(frozen=True)
class Difference:
    """B - A: the mean over items and trainings, with a 95% interval and a two-sided p over both."""

    mean: float
    low: float
    high: float
    p: float
    trainings: int
    items: int

    @property
    def has_few_items(self) -> bool:
        """Whether the items are too few for any claim."""
        return self.items < MIN_ITEMS

    @property
    def sentence(self) -> str:
        """A sentence on whether B is better."""
        width = (self.high - self.low) / 2
        plural = "s" if self.trainings > 1 else ""
        interval = f"± {width:.2f}, p = {self.p:.2g}, {self.trainings} training{plural} each"
        if not self.has_few_items and (self.low > 0 or self.high < 0):
            return f"{'better' if self.mean > 0 else 'worse'} by {abs(self.mean):.2f} {interval}"
        return f"no difference shown: {self.mean:+.2f} {interval}" + (
            f"; {self.items} items are too few" if self.has_few_items else ""
        )


def two_level_difference(
    differences: Floats, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """The mean of B - A with an interval over items and trainings at once.

    differences: [items, trainings], paired. Items are drawn with replacement (docs/method.md,
    eq. 26). The error of the mean over trainings is drawn from Student's t, since the bootstrap
    underestimates the spread of a few trainings: in 1000 simulated studies of 2 to 10 trainings on
    60 and 500 items, this interval covered the truth in 95 to 99.6% of the trials, and drawing
    trainings with replacement in 74 to 99%. With one training the interval is over items alone.
    """
    trainings = differences.shape[1]
    mean = float(differences.mean())
    means = resampled_means(differences.mean(1), resamples=resamples, seed=seed)
    if trainings > 1:
        standard_error = differences.mean(0).std(ddof=1) / trainings**0.5
        draws = np.random.default_rng([seed, trainings]).standard_t(trainings - 1, resamples)
        # The sign makes A - B the exact opposite of B - A.
        means += np.copysign(standard_error, mean) * draws
    return Difference(
        mean, *percentile_interval(means), two_sided_p(means), trainings, len(differences)
    )


def progress_lines(folder: Path, cells: Sequence[Cell]) -> list[str]:
    """One line for each cell: its state, and ROUGE-L once it is finished."""
    rows = [["cell", "visits", "state", "ROUGE-L"]]
    for cell in cells:
        run, visits = cell_directory(folder, cell), f"{sample_visits(cell.recipe):g}"
        metrics = run.train / "metrics.jsonl"
        if is_finished(folder, cell) and cell.until == "rank":
            rows.append([cell.name, visits, "done", ""])
        elif is_finished(folder, cell):
            models = read_results(run)["models"].get(STUDENT, {"benchmarks": {}})
            scores = ", ".join(
                f"{name} {entry['rouge_l']:.2f}" for name, entry in models["benchmarks"].items()
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
    results = read_results(cell_directory(folder, finished[0]))
    benchmarks = list(results["models"][STUDENT]["benchmarks"])
    return [
        *_mean_lines(folder, finished, benchmarks),
        *_pair_lines(folder, study, finished, cells, benchmarks),
        *_unequal_visits(folder, finished, cells),
    ]


def _mean_lines(folder: Path, finished: Sequence[Cell], benchmarks: Sequence[str]) -> list[str]:
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
        scores = [_mean_and_deviation([e[name]["rouge_l"] for e in entries]) for name in benchmarks]
        rows.append([group, str(len(runs)), *scores, _validation_loss(runs), *_mean_times(runs)])
    return align_columns(rows, numbers=True) + merge_footnotes(labeled_results, benchmarks)


def _pair_lines(
    folder: Path,
    study: StudyConfig,
    finished: Sequence[Cell],
    cells: Sequence[Cell],
    benchmarks: Sequence[str],
) -> list[str]:
    """A sentence for each pair of arms, point of the grid and benchmark, and what limits them."""
    titles = [*benchmarks, ALL_ITEMS] if len(benchmarks) > 1 else benchmarks
    points = dict.fromkeys(cell.point for cell in cells)
    lines: list[str] = []
    differences: list[Difference] = []
    for (better, worse), point, title in itertools.product(study.compare, points, titles):
        names = benchmarks if title == ALL_ITEMS else [title]
        if difference := _pair_difference(folder, finished, (worse, better), point, names):
            labels = "".join(f", {label}" for _, label in point)
            lines.append(f"{title}{labels}: {better} against {worse}: {difference.sentence}")
            differences.append(difference)

    # Many comparisons find differences by chance; one training each hides the spread of trainings.
    tests = sum(item.trainings > 1 and not item.has_few_items for item in differences)
    if tests > 1:
        lines.append(
            f"{tests} comparisons: {0.05 * tests:.1f} of them would show a difference between "
            "equal arms by chance"
        )
    if any(item.trainings == 1 for item in differences):
        lines.append(
            "with one training each, an interval covers items alone and not how much trainings "
            "differ"
        )
    return lines


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


def _pair_difference(
    folder: Path,
    finished: Sequence[Cell],
    arms: tuple[str, str],
    point: tuple[tuple[str, str], ...],
    benchmarks: Sequence[str],
) -> Difference | None:
    """The second arm minus the first over all items of some benchmarks and the seeds that both have
    finished; None without such a seed.
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
                    MEASURE,
                ).scores
                for side in sides
            )
            differences += [
                fmean(scores_b[item]) - fmean(scores)
                for item, scores in scores_a.items()
                if item in scores_b
            ]
        columns.append(np.array(differences))
    return two_level_difference(np.stack(columns, 1))


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
