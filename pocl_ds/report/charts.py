"""The charts of the pages as plain values: series, bars and points, with titles, units and notes.

A script of the page draws them. Numbers have five digits, more than a screen shows; values that are
not finite become None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.report.run_summary import STEP_PARTS, DifficultyRanking, RunSummary, TrainingCurves
from pocl_ds.report.samples import evenly_spaced

Floats = NDArray[np.floating[Any]]
Chart = dict[str, Any]
Bands = list[tuple[float, float, str]]  # first and last step of a stage, and its label
Column = tuple[str, str, str, list[int]]  # label, color, column of the metrics, dash pattern
MAX_POINTS = 4000  # of a curve
MAX_DOTS = 30_000  # of the scatter plot
BINS = 40  # of a histogram
# Dash patterns of runs, which distinguish curves that coincide.
DASHES: list[list[int]] = [[], [9, 4], [3, 3], [9, 3, 3, 3]]
CROSS_ENTROPY, ROUGE_L = "cross-entropy (nats per token)", "ROUGE-L ×100"
SCHEDULED = ("temperature", "sft_ratio")  # constant within a stage


def training_charts(summary: RunSummary) -> list[Chart]:
    """Training metrics over optimizer steps, with a band for each stage."""
    curves = summary.curves
    if curves is None:
        return []
    steps, bands = downsample(curves.steps), stage_bands(curves)
    losses: list[Column] = [
        ("total", "ink", "loss", []),
        ("KD loss", "orange", "kd_loss", [7, 3]),
        ("SFT loss", "accent", "sft_loss", []),
    ]
    schedules: list[Column] = [
        ("temperature", "orange", "temperature", []),
        ("SFT ratio", "accent", "sft_ratio", []),
    ]
    charts = [
        line_chart(
            "Training loss",
            "loss (nats per token)",
            _series(steps, losses),
            bands,
            note="total = SFT ratio · SFT loss + (1 − SFT ratio) · KD loss. The KD loss depends on "
            "the temperature of the stage.",
            wide=True,
        ),
        line_chart(
            "Temperature and SFT ratio",
            "value",
            _series(steps, schedules),
            bands,
            from_zero=True,
            note="Both are constant within a stage.",
        ),
        _validation_chart(curves, summary.baseline_curves, bands),
        _domain_chart(curves, bands),
    ]
    for column, title, label, note in (
        ("grad_norm", "Gradient norm", "gradient norm", "Before clipping."),
        ("lr", "Learning rate", "learning rate", ""),
        ("tokens_per_second", "Throughput", "tokens per second", ""),
        ("mfu", "MFU", "share of the GPUs' peak", "Model FLOPs utilization."),
        (
            "load_imbalance",
            "Load imbalance",
            "costliest rank / mean",
            "Of the arithmetic in each micro-step; 1 is balanced.",
        ),
    ):
        series = _series(steps, [(label, "accent", column, [])])
        charts.append(line_chart(title, label, series, bands, from_zero=True, note=note))
    charts.append(_step_time_chart(steps, bands))
    return [chart for chart in charts if chart["series"]]


def difficulty_charts(summary: RunSummary) -> list[Chart]:
    """ROUGE-L against cross-entropy of every sample, and a histogram of each."""
    ranking = summary.ranking
    if ranking is None or not len(ranking.rouge_l):
        return []
    names, name = subset_names(ranking), ranking.rouge_tokenizer
    tokens = "" if name == "rouge_score" else f" Compared by {name.replace('_', ' ')}."
    return [
        _scatter_chart(ranking, names),
        _histogram(
            "Difficulty: cross-entropy",
            CROSS_ENTROPY,
            ranking.cross_entropy,
            ranking.bounds,
            names,
            note="Of the reference. The last bar includes all larger values.",
        ),
        _histogram(
            "Difficulty: ROUGE-L",
            ROUGE_L,
            100 * ranking.rouge_l,
            ranking.bounds,
            names,
            note="Of the initial student's response; higher is easier." + tokens,
        ),
    ]


def visit_charts(summary: RunSummary) -> list[Chart]:
    """How often each sample was visited."""
    if summary.sample_visits is None or summary.plan is None:
        return []
    bounds = subset_bounds(summary.plan)
    names = [f"subset {i + 1}" for i in range(len(bounds) - 1)]
    return [
        _histogram(
            "Sample visits",
            "visits of a sample",
            summary.sample_visits.astype(float),
            bounds,
            subset_names(summary.ranking) if summary.ranking else names,
            note="How often the curriculum has drawn each sample so far, computed from plan and "
            "seed.",
            integers=True,
        )
    ]


def overlay_charts(runs: Mapping[str, TrainingCurves]) -> list[Chart]:
    """The curves of several runs on common axes, without bands, since their stages differ."""
    downsampled = {name: downsample(curves.steps) for name, curves in runs.items()}
    charts = []
    for column, title, label in (
        ("loss", "Training loss", "loss (nats per token)"),
        ("kd_loss", "KD loss", "KD loss (nats per token)"),
        ("sft_loss", "SFT loss", "SFT loss (nats per token)"),
        ("temperature", "Temperature", "temperature"),
        ("sft_ratio", "SFT ratio", "SFT ratio"),
        ("grad_norm", "Gradient norm", "gradient norm"),
        ("lr", "Learning rate", "learning rate"),
    ):
        series = [
            curve
            for i, (name, steps) in enumerate(downsampled.items())
            for curve in _series(steps, [(name, f"r{i % 8}", column, DASHES[i % 4])])
        ]
        from_zero, wide = column in (*SCHEDULED, "lr"), column == "loss"
        charts.append(line_chart(title, label, series, [], from_zero=from_zero, wide=wide))
    validation = [
        curve
        for i, (name, curves) in enumerate(runs.items())
        for curve in _validation_series(curves, name, f"r{i % 8}", DASHES[i % 4])
    ]
    note = "At temperature 1."
    charts.insert(1, line_chart("Validation loss", CROSS_ENTROPY, validation, [], note=note))
    return [chart for chart in charts if chart["series"]]


def downsample(steps: Mapping[str, Floats], limit: int = MAX_POINTS) -> dict[str, Floats]:
    """At most `limit` points: means of the finite values of neighboring steps of one stage."""
    step, stage = steps["step"], steps["stage"]
    if len(step) <= limit:
        return dict(steps)
    starts = _stage_starts(stage)
    if len(starts) > limit // 2:
        starts = [0]
    # Divide each stage into buckets, proportional to its length.
    edges: list[int] = []
    for start, stop in zip(starts, [*starts[1:], len(step)], strict=True):
        buckets = min(1 + (limit - len(starts)) * (stop - start) // len(step), stop - start)
        edges += (start + np.arange(buckets) * (stop - start) // buckets).tolist()
    means = {}
    for name, values in steps.items():
        finite = np.isfinite(values)
        count = np.add.reduceat(finite.astype(float), edges)
        total = np.add.reduceat(np.where(finite, values, 0.0), edges)
        means[name] = np.divide(total, count, out=np.full(len(edges), np.nan), where=count > 0)
    return means


def stage_bands(curves: TrainingCurves) -> Bands:
    """First step, first step of the next stage, and label of each stage."""
    step, stage = curves.steps["step"], curves.steps["stage"]
    starts = _stage_starts(stage)
    edges = [*(float(step[i]) for i in starts), float(step[-1])]
    return [
        (edges[i], edges[i + 1], f"stage {int(stage[start]) + 1}") for i, start in enumerate(starts)
    ]


def subset_bounds(plan: Mapping[str, Any]) -> list[int]:
    """Bounds of the subsets in the ranking: subset i is [bounds[i], bounds[i + 1])."""
    return [0, *map(int, plan["subset_ends"])]


def subset_names(ranking: DifficultyRanking) -> list[str]:
    """Labels of the subsets."""
    count = len(ranking.bounds) - 1
    names = [f"subset {i + 1}" for i in range(count)]
    if count > 1:
        names[0] += f" ({ranking.end_labels[0]})"
        names[-1] += f" ({ranking.end_labels[1]})"
    return names


def rounded_values(values: Floats) -> list[float | None]:
    """Values for JSON: five digits, integers as integers, None if not finite."""
    return [
        None if not np.isfinite(v) else int(v) if v == int(v) else float(f"{v:.5g}")
        for v in values.tolist()
    ]


def _stage_starts(stage: Floats) -> list[int]:
    """Indices at which a stage begins."""
    return [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist()]


def line_chart(
    title: str,
    label: str,
    series: list[Chart],
    bands: Bands,
    *,
    from_zero: bool = False,
    note: str = "",
    wide: bool = False,
) -> Chart:
    """Curves over optimizer steps. from_zero: the vertical axis includes 0."""
    return {
        "kind": "lines",
        "title": title,
        "x": "optimizer step",
        "y": label,
        "series": series,
        "bands": bands,
        "from_zero": from_zero,
        "note": note,
        "wide": wide,
        "integers": True,
    }


def curve(name: str, color: str, dash: list[int], xs: Floats, ys: Floats, **style: bool) -> Chart:
    """`markers` draws a dot at each point, `stepped` draws horizontal segments."""
    return {
        "name": name,
        "color": color,
        "dash": dash,
        "markers": style.get("markers", False),
        "stepped": style.get("stepped", False),
        "xs": rounded_values(xs),
        "ys": rounded_values(ys),
    }


def _series(steps: Mapping[str, Floats], columns: Sequence[Column]) -> list[Chart]:
    """The curves of those columns that have values."""
    return [
        curve(label, color, dash, steps["step"], steps[column], stepped=column in SCHEDULED)
        for label, color, column, dash in columns
        if np.isfinite(steps[column]).any()
    ]


def _step_time_chart(steps: Mapping[str, Floats], bands: Bands) -> Chart:
    """The seconds of a step's parts."""
    columns: list[Column] = [
        (column.removesuffix("_seconds"), f"r{i}", column, DASHES[i % len(DASHES)])
        for i, column in enumerate(STEP_PARTS)
    ]
    note = "wait is the rest of a step: other ranks, and on a GPU the time without work."
    return line_chart(
        "Time of a step", "seconds", _series(steps, columns), bands, from_zero=True, note=note
    )


def _validation_chart(
    curves: TrainingCurves, baseline: TrainingCurves | None, bands: Bands
) -> Chart:
    series = []
    for suffix, dash, run_curves in (
        (", POCL" if baseline else "", [], curves),
        (", plain KD", [2, 4], baseline),
    ):
        if run_curves is not None:
            series += _validation_series(run_curves, f"cross-entropy{suffix}", "accent", dash)
            kd_dash = dash or [7, 3]
            kd_series = _validation_series(
                run_curves, f"KD loss{suffix}", "orange", kd_dash, "validation_kd_loss"
            )
            series += [curve for curve in kd_series if any(curve["ys"])]  # 0 without a teacher
    note = (
        "At temperature 1, at the end of each stage and every train.validate_every_n_steps "
        "optimizer steps."
    )
    return line_chart("Validation", "nats per token", series, bands, note=note)


def _domain_chart(curves: TrainingCurves, bands: Bands) -> Chart:
    """The validation loss of each domain."""
    key = "validation_loss_by_domain"
    records = [record for record in curves.validation if key in record]
    steps = np.array([record["step"] for record in records], float)
    series = []
    for i, domain in enumerate(records[0][key] if records else ()):
        losses = np.array([record[key][domain] for record in records], float)
        series.append(curve(domain, f"r{i % 8}", DASHES[i % 4], steps, losses, markers=True))
    return line_chart("Validation loss by domain", CROSS_ENTROPY, series, bands)


def _validation_series(
    curves: TrainingCurves,
    name: str,
    color: str,
    dash: list[int],
    key: str = "validation_loss",
) -> list[Chart]:
    """One curve, or none if there are no values."""
    points = [
        (float(record["step"]), float(record[key]))
        for record in curves.validation
        if record.get(key) is not None
    ]
    if not points:
        return []
    xs, ys = np.array(points, float).T
    return [curve(name, color, dash, xs, ys, markers=True)]


def _scatter_chart(ranking: DifficultyRanking, names: list[str]) -> Chart:
    total = len(ranking.rouge_l)
    positions = evenly_spaced(total, MAX_DOTS)
    note = "One dot per sample, before distillation. Click on a dot to show its sample below."
    if len(positions) < total:
        note += (
            f" {len(positions):,} of {total:,} samples are shown, evenly spaced along the ranking."
        )
    return {
        "kind": "scatter",
        "title": "ROUGE-L against cross-entropy",
        "x": CROSS_ENTROPY,
        "y": ROUGE_L,
        "names": names,
        "bounds": ranking.bounds,
        "positions": positions.tolist(),
        "xs": rounded_values(ranking.cross_entropy[positions]),
        "ys": rounded_values(100 * ranking.rouge_l[positions]),
        "wide": True,
        "note": note,
    }


def _histogram(
    title: str,
    label: str,
    values: Floats,
    bounds: Sequence[int],
    names: list[str],
    *,
    note: str,
    integers: bool = False,
) -> Chart:
    """Counts by subset. The range ends at the 99.5th percentile; the last bar includes all larger
    values. integers: values are integers, with a bar each if there are few.
    """
    low = float(values.min())
    if integers:
        high = float(values.max())
        width = max(1, -(-int(high - low + 1) // BINS))
        edges = np.arange(low - 0.5, high + 0.5 + width, width)
    else:
        high = float(np.quantile(values, 0.995))
        edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    subsets = [values[start:stop] for start, stop in pairwise(bounds)]
    counts = [
        np.histogram(np.clip(subset, edges[0], edges[-1]), edges)[0].tolist() for subset in subsets
    ]
    return {
        "kind": "bars",
        "title": title,
        "x": label,
        "y": "samples",
        "names": names,
        "edges": rounded_values(edges),
        "counts": counts,
        "note": note,
        "wide": False,
        "integers": integers,
    }
