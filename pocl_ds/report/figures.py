"""The figures of the page: which data go into which chart, with title, legend and a note."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocl_ds.report.charts import WIDE, Band, Floats, Line, downsample, histogram, line_chart, scatter, thin
from pocl_ds.report.read import Curves, Facts, Ranking

LIGHT = ("#2bb3a3", "#2f7fc1", "#4a3aa0", "#24104f")
DARK = ("#b8f5e0", "#63c4ee", "#6f8df0", "#9a63e0")


@dataclass(frozen=True)
class Figure:
    """One chart. legend: (name, CSS class) pairs; empty where the chart explains itself."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    svg: str
    wide: bool = False


def figures(facts: Facts) -> list[Figure]:
    """All charts that the run has data for."""
    found: list[Figure | None] = []
    if facts.curves is not None:
        found += [_loss(facts.curves), _schedule(facts.curves), _validation(facts.curves, facts.baseline),
                  _single(facts.curves, "lr", "Learning rate", "learning rate"),
                  _single(facts.curves, "tokens_per_second", "Throughput", "tokens per second")]  # fmt: skip
    if facts.ranking is not None and len(facts.ranking.rouge_l):
        found += _difficulty(facts.ranking)
    return [figure for figure in found if figure is not None]


def subset_styles(count: int) -> list[str]:
    """CSS classes of subsets, in their order."""
    return [f"s{i}" for i in range(count)]


def ramp(anchors: Sequence[str], count: int) -> list[str]:
    """`count` colours along a ramp of #rrggbb anchors, dark or light growing with difficulty."""
    points = np.array([[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors], float)
    places = np.linspace(0, len(anchors) - 1, count) if count > 1 else np.array([1.0])
    channels = [np.interp(places, np.arange(len(anchors)), points[:, channel]).round().astype(int) for channel in range(3)]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in zip(*channels, strict=True)]


def _series(curves: Curves, column: str) -> tuple[Floats, Floats]:
    return downsample(curves.steps["step"], curves.steps[column], curves.steps["stage"])


def _bands(curves: Curves) -> list[Band]:
    """One band for each stage, from its first step to the next one's."""
    step, stage = curves.steps["step"], curves.steps["stage"]
    starts = [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist()]
    edges = [*(float(step[i]) for i in starts), float(step[-1])]
    return [Band(edges[i], edges[i + 1], f"stage {int(stage[start]) + 1}") for i, start in enumerate(starts)]


def _lines(curves: Curves, columns: Sequence[tuple[str, str, str]]) -> list[Line]:
    """(name, CSS class, column) -> the series that have points."""
    lines = [Line(name, style, *_series(curves, column)) for name, style, column in columns]
    return [line for line in lines if len(line.x)]


def _loss(curves: Curves) -> Figure | None:
    lines = _lines(curves, [("total", "c-total", "loss"), ("KD", "c-kd", "kd"), ("CE", "c-ce", "ce")])
    if not lines:
        return None
    svg = line_chart("Training loss over steps", lines, x_label="optimizer step", y_label="loss (nats per token)",
                     bands=_bands(curves), width=WIDE)
    note = "total = α · CE + (1 − α) · KD; tau changes between stages, and the KD term with it."
    return Figure("Training loss", note, [(line.name, line.style) for line in lines], svg, wide=True)


def _schedule(curves: Curves) -> Figure | None:
    lines = _lines(curves, [("τ, temperature", "c-kd", "tau"), ("α, share of SFT", "c-ce", "alpha")])
    if not lines:
        return None
    svg = line_chart("Temperature and SFT ratio over steps", lines, x_label="optimizer step", y_label="value",
                     bands=_bands(curves), from_zero=True)
    return Figure("Temperature and SFT ratio", "Both change only between stages.",
                  [(line.name, line.style) for line in lines], svg)


def _validation(curves: Curves, baseline: Curves | None) -> Figure | None:
    lines = []
    for name, suffix, side in (("POCL", "", curves), ("plain KD", "-2", baseline)):
        for label, style, key in (("cross-entropy", "c-ce", "validation_ce"), ("divergence", "c-kd", "validation_kd")):
            pairs = [(float(r["step"]), float(r[key])) for r in (side.validation if side else []) if r.get(key) is not None]
            x, y = downsample(*np.array(pairs, float).reshape(-1, 2).T)
            if len(x) and (key == "validation_ce" or y.any()):
                lines.append(Line(f"{label}, {name}" if baseline else label, style + suffix, x, y, dots=True))
    if not lines:
        return None
    svg = line_chart("Validation over steps", lines, x_label="optimizer step", y_label="nats per token", bands=_bands(curves))
    return Figure("Validation", "Measured at the end of each stage, at τ = 1.", [(line.name, line.style) for line in lines], svg)


def _single(curves: Curves, column: str, title: str, label: str) -> Figure | None:
    lines = _lines(curves, [(label, "c-ce", column)])
    if not lines:
        return None
    svg = line_chart(f"{title} over steps", lines, x_label="optimizer step", y_label=label, bands=_bands(curves), from_zero=True)
    return Figure(title, "", [], svg)


def _difficulty(ranking: Ranking) -> list[Figure]:
    parts = [slice(a, b) for a, b in zip(ranking.bounds, ranking.bounds[1:], strict=False) if b > a]
    styles = subset_styles(len(parts))
    ends = dict(zip((0, len(parts) - 1), (f" ({end})" for end in ranking.ends), strict=True)) if len(parts) > 1 else {}
    legend = [(f"subset {i + 1}{ends.get(i, '')}", style) for i, style in enumerate(styles)]
    entropy, rouge = ranking.cross_entropy, 100 * ranking.rouge_l
    kept = thin(len(entropy))
    dots = [kept[(kept >= part.start) & (kept < part.stop)] for part in parts]
    groups = [(entropy[positions], rouge[positions]) for positions in dots]
    shown = "" if len(kept) == len(entropy) else f" {len(kept):,} of {len(entropy):,} samples are shown, evenly along the order."
    entropy_label, rouge_label = "cross-entropy of the reference (nats per token)", "ROUGE-L ×100"
    return [
        Figure("Difficulty: cross-entropy", "Last bar: all that lies beyond.", legend,
               histogram("Cross-entropy by subset", [entropy[part] for part in parts], styles, x_label=entropy_label,
                         y_label="samples")),
        Figure("Difficulty: ROUGE-L", "Of the initial student's own answer; higher is easier.", legend,
               histogram("ROUGE-L by subset", [rouge[part] for part in parts], styles, x_label=rouge_label, y_label="samples")),
        Figure("ROUGE-L against cross-entropy", "One dot a sample, before distillation." + shown, legend,
               scatter("ROUGE-L against cross-entropy by subset", groups, styles, x_label=entropy_label, y_label=rouge_label,
                       width=WIDE), wide=True),
    ]  # fmt: skip
