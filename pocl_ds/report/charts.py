"""What the charts show: series, bars and points as plain values, with titles, units and notes. The
page's script draws them.

Numbers are rounded to 5 digits, which a screen cannot tell from more; what is not finite becomes
None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.report.max_samples import thin
from pocl_ds.report.run_summary import Curves, Facts, Ranking

Floats = NDArray[np.floating[Any]]
Chart = dict[str, Any]
Column = tuple[str, str, str, list[int]]  # name, colour, column of the steps, dashes
MAX_POINTS = 4000
MAX_DOTS = 30_000
BINS = 40
DASHES: list[list[int]] = [
    [],
    [9, 4],
    [3, 3],
    [9, 3, 3, 3],
]  # of runs: lines that coincide are still told apart
ENTROPY, ROUGE = "cross-entropy (nats per token)", "ROUGE-L ×100"
SINGLE = (
    ("grad_norm", "Gradient norm", "gradient norm", "Before clipping."),
    ("lr", "Learning rate", "learning rate", ""),
    ("tokens_per_second", "Throughput", "tokens per second", ""),
)


def training_charts(facts: Facts) -> list[Chart]:
    """Over optimizer steps, with a band for each stage."""
    curves = facts.curves
    if curves is None:
        return []
    steps, bands = downsample(curves.steps), stage_bands(curves)
    note = "total = α · CE + (1 − α) · KD; temperature changes between stages, and the KD term with it."
    loss: list[Column] = [
        ("total", "ink", "loss", []),
        ("KD", "orange", "kd", [7, 3]),
        ("CE", "accent", "ce", []),
    ]
    schedule: list[Column] = [
        ("τ, temperature", "orange", "temperature", []),
        ("α, share of SFT", "accent", "sft_ratio", []),
    ]
    charts = [
        _lines(
            "Training loss",
            "loss (nats per token)",
            _columns(steps, loss),
            bands,
            note=note,
            wide=True,
        ),
        _lines(
            "Temperature and SFT ratio",
            "value",
            _columns(steps, schedule),
            bands,
            zero=True,
            note="Both change only between stages.",
        ),
        _validation(curves, facts.baseline, bands),
        *(
            _lines(
                title,
                label,
                _columns(steps, [(label, "accent", column, [])]),
                bands,
                zero=True,
                note=note,
            )
            for column, title, label, note in SINGLE
        ),
    ]
    return [chart for chart in charts if chart["series"]]


def difficulty_charts(facts: Facts) -> list[Chart]:
    """The plane of ROUGE-L against cross-entropy, and a histogram of each."""
    ranking = facts.ranking
    if ranking is None or not len(ranking.rouge_l):
        return []
    names = subset_names(ranking)
    return [_plane(ranking, names)] + [
        _bars(title, label, values, ranking.bounds, names, note=note)
        for title, label, values, note in (
            (
                "Difficulty: cross-entropy",
                ENTROPY,
                ranking.cross_entropy,
                "Of the reference; the last bar is all beyond.",
            ),
            (
                "Difficulty: ROUGE-L",
                ROUGE,
                100 * ranking.rouge_l,
                "Of the initial student's own answer; higher is easier.",
            ),
        )
    ]


def seen_charts(facts: Facts) -> list[Chart]:
    """How often samples were drawn."""
    if facts.seen is None or facts.plan is None:
        return []
    bounds = subset_bounds(facts.plan)
    names = (
        subset_names(facts.ranking)
        if facts.ranking
        else [f"subset {i + 1}" for i in range(len(bounds) - 1)]
    )
    note = "Draws by the curriculum, so far as training has come; the plan and the seed say who is in which batch."
    return [
        _bars(
            "How often samples were seen",
            "times drawn",
            facts.seen.astype(float),
            bounds,
            names,
            note=note,
            whole=True,
        )
    ]


def overlaid(runs: Mapping[str, Curves]) -> list[Chart]:
    """The same curve of several runs on common axes, without bands: stages of different runs
    differ.
    """
    thinned = {name: downsample(curves.steps) for name, curves in runs.items()}
    charts = []
    for column, title, label in (
        ("loss", "Training loss", "loss (nats per token)"),
        ("kd", "KD term", "KD (nats per token)"),
        ("ce", "CE term", "CE (nats per token)"),
        ("temperature", "Temperature", "temperature"),
        ("sft_ratio", "SFT ratio", "sft_ratio"),
        ("grad_norm", "Gradient norm", "gradient norm"),
        ("lr", "Learning rate", "learning rate"),
    ):
        series = [
            one
            for i, (name, steps) in enumerate(thinned.items())
            for one in _columns(steps, [(name, f"r{i % 8}", column, DASHES[i % 4])])
        ]
        charts.append(
            _lines(
                title,
                label,
                series,
                [],
                zero=column in ("temperature", "sft_ratio", "lr"),
                wide=column == "loss",
            )
        )
    checked = [
        one
        for i, (name, curves) in enumerate(runs.items())
        for one in _checked(curves, name, f"r{i % 8}", DASHES[i % 4])
    ]
    charts.insert(
        1,
        _lines("Validation loss", "cross-entropy (nats per token)", checked, [], note="At τ = 1."),
    )
    return [chart for chart in charts if chart["series"]]


def downsample(steps: Mapping[str, Floats], limit: int = MAX_POINTS) -> dict[str, Floats]:
    """At most `limit` points: means of neighbouring steps' finite values. No mean reaches over a
    change of stage.
    """
    step, stage = steps["step"], steps["stage"]
    if len(step) <= limit:
        return dict(steps)
    changes = [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist()]
    if len(changes) > limit // 2:
        changes = [0]
    edges: list[int] = []
    for start, stop in zip(changes, [*changes[1:], len(step)], strict=True):
        buckets = min(1 + (limit - len(changes)) * (stop - start) // len(step), stop - start)
        edges += (start + np.arange(buckets) * (stop - start) // buckets).tolist()
    found = {}
    for name, values in steps.items():
        finite = np.isfinite(values)
        count = np.add.reduceat(finite.astype(float), edges)
        total = np.add.reduceat(np.where(finite, values, 0.0), edges)
        found[name] = np.divide(total, count, out=np.full(len(edges), np.nan), where=count > 0)
    return found


def stage_bands(curves: Curves) -> list[tuple[float, float, str]]:
    """(first step, first step of the next, label) of each stage."""
    step, stage = curves.steps["step"], curves.steps["stage"]
    starts = [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist()]
    edges = [*(float(step[i]) for i in starts), float(step[-1])]
    return [
        (edges[i], edges[i + 1], f"stage {int(stage[start]) + 1}") for i, start in enumerate(starts)
    ]


def subset_bounds(plan: Mapping[str, Any]) -> list[int]:
    """Subset i of the order is [bounds[i], bounds[i + 1])."""
    return [0, *(int(stage["stop"]) for stage in plan["stages"])]


def subset_names(ranking: Ranking) -> list[str]:
    """What a reader calls the subsets."""
    count = len(ranking.bounds) - 1
    ends = (
        dict(zip((0, count - 1), (f" ({end})" for end in ranking.ends), strict=True))
        if count > 1
        else {}
    )
    return [f"subset {i + 1}{ends.get(i, '')}" for i in range(count)]


def numbers(values: Floats) -> list[float | None]:
    """Plain values with 5 digits, whole ones as whole numbers."""
    return [
        None if not np.isfinite(v) else int(v) if v == int(v) else float(f"{v:.5g}")
        for v in values.tolist()
    ]


def _lines(
    title: str,
    label: str,
    series: list[Chart],
    bands: list[tuple[float, float, str]],
    *,
    zero: bool = False,
    note: str = "",
    wide: bool = False,
) -> Chart:
    return {
        "kind": "lines",
        "title": title,
        "x": "optimizer step",
        "y": label,
        "series": series,
        "bands": bands,
        "zero": zero,
        "note": note,
        "wide": wide,
        "whole": True,
    }


def _columns(steps: Mapping[str, Floats], columns: Sequence[Column]) -> list[Chart]:
    """The series that have values."""
    return [
        {
            "name": name,
            "colour": colour,
            "dash": dash,
            "dots": False,
            "steps": column in ("temperature", "sft_ratio"),
            "xs": numbers(steps["step"]),
            "ys": numbers(steps[column]),
        }
        for name, colour, column, dash in columns
        if np.isfinite(steps[column]).any()
    ]


def _validation(
    curves: Curves, baseline: Curves | None, bands: list[tuple[float, float, str]]
) -> Chart:
    series = []
    for name, dash, side in (
        (", POCL" if baseline else "", [], curves),
        (", plain KD", [2, 4], baseline),
    ):
        if side is not None:
            series += _checked(side, f"cross-entropy{name}", "accent", dash)
            divergence = _checked(
                side, f"divergence{name}", "orange", dash or [7, 3], "validation_kd"
            )
            series += [one for one in divergence if any(one["ys"])]  # none without a teacher
    return _lines(
        "Validation",
        "nats per token",
        series,
        bands,
        note="Measured at τ = 1, at the end of each stage and every train.validate_every_n_steps steps.",
    )


def _checked(
    curves: Curves, name: str, colour: str, dash: list[int], key: str = "validation_ce"
) -> list[Chart]:
    pairs = [(float(r["step"]), float(r[key])) for r in curves.validation if r.get(key) is not None]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    if not pairs:
        return []
    return [
        {
            "name": name,
            "colour": colour,
            "dash": dash,
            "dots": True,
            "steps": False,
            "xs": numbers(x),
            "ys": numbers(y),
        }
    ]


def _plane(ranking: Ranking, names: list[str]) -> Chart:
    kept = thin(len(ranking.rouge_l), MAX_DOTS)
    left_out = (
        ""
        if len(kept) == len(ranking.rouge_l)
        else (
            f" {len(kept):,} of {len(ranking.rouge_l):,} samples are shown, evenly along the order."
        )
    )
    return {
        "kind": "plane",
        "title": "ROUGE-L against cross-entropy",
        "x": ENTROPY,
        "y": ROUGE,
        "names": names,
        "bounds": ranking.bounds,
        "places": kept.tolist(),
        "xs": numbers(ranking.cross_entropy[kept]),
        "ys": numbers(100 * ranking.rouge_l[kept]),
        "wide": True,
        "note": f"One dot a sample, before distillation. A click on a dot shows its sample "
        f"below.{left_out}",
    }


def _bars(
    title: str,
    label: str,
    values: Floats,
    bounds: Sequence[int],
    names: list[str],
    *,
    note: str,
    whole: bool = False,
) -> Chart:
    """Counts by subset. The range ends at the 99.5th percentile; what lies beyond counts in the
    last bar.
    """
    low, high = float(values.min()), float(values.max() if whole else np.quantile(values, 0.995))
    if whole:  # a bar a number, as long as they are few
        width = max(1, -(-int(high - low + 1) // BINS))
        edges = np.arange(low - 0.5, high + 0.5 + width, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    parts = [values[a:b] for a, b in pairwise(bounds)]
    counts = [np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0].tolist() for part in parts]
    return {
        "kind": "bars",
        "title": title,
        "x": label,
        "y": "samples",
        "names": names,
        "edges": numbers(edges),
        "counts": counts,
        "note": note,
        "wide": False,
        "whole": whole,
    }
