"""The page of a study, `study.html`: effects with their intervals, learning curves by domain, and
the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocl_ds.evaluation.compare_models import MEASURES
from pocl_ds.report.charts import CROSS_ENTROPY, DASHES, Chart, curve, line_chart
from pocl_ds.report.document import (
    chart_figures,
    html_document,
    page_header,
    preformatted,
    section,
)
from pocl_ds.report.formatting import escape_html
from pocl_ds.study.cells import Cell, StudyConfig
from pocl_ds.study.learning_curves import LearningCurves, read_learning_curves
from pocl_ds.study.run import is_finished
from pocl_ds.study.table import Pair, read_pairs
from pocl_ds.workflow.files import atomic_write

MAX_GROUPS = 8  # curves in a chart
WIDTH, ROW, LABELS, MARGIN = 1080, 30, 400, 24  # of the plot of effects, in pixels


def write_study_page(
    folder: Path, study: StudyConfig, cells: Sequence[Cell], tables: Sequence[str]
) -> Path | None:
    """Write `study.html` to the study's folder; None while no cell is finished, and for a study of
    rankings, which trains nothing.

    tables: what `result_lines` returns.
    """
    finished = [cell for cell in cells if is_finished(folder, cell)]
    if not finished or study.until == "rank":
        return None
    path = folder / "study.html"
    with atomic_write(path) as stream:
        stream.write(_page(folder, study, cells, finished, tables))
    return path


def _page(
    folder: Path,
    study: StudyConfig,
    cells: Sequence[Cell],
    finished: Sequence[Cell],
    tables: Sequence[str],
) -> str:
    charts = learning_charts(read_learning_curves(folder, finished), study)
    name, _ = MEASURES[study.measure]
    html = "".join(
        [
            page_header("study", study.name, f"{len(finished)} of {len(cells)} trainings"),
            section(
                "Effects",
                effect_plot(read_pairs(folder, study, cells)),
                anchor="effects",
                note=f"Difference in {name}, with 95% intervals over items and trainings. Right of "
                "the line the first arm is better.",
            ),
            section("Learning by domain", chart_figures(charts, 0), anchor="learning"),
            section(
                "Tables",
                preformatted("\n".join(tables)),
                anchor="tables",
            ),
        ]
    )
    return html_document(f"Study {study.name}", html, {"charts": charts, "samples": None})


def effect_plot(pairs: Sequence[Pair]) -> str:
    """An SVG with a dot and an interval for each pair; empty without pairs."""
    if not pairs:
        return ""
    bound = max(max(abs(p.result.low), abs(p.result.high)) for p in pairs) or 1.0
    plot = WIDTH - LABELS - 2 * MARGIN

    def x(value: float) -> str:
        return f"{LABELS + MARGIN + plot * (value + bound) / (2 * bound):.1f}"

    height = ROW * (len(pairs) + 1)
    parts = [
        f'<line x1="{x(0)}" x2="{x(0)}" y1="0" y2="{height - ROW}" stroke="var(--soft)"/>',
        *(
            f'<text x="{x(value)}" y="{height - 8}" text-anchor="middle" fill="var(--soft)" '
            f'font-size="13">{value:+.1f}</text>'
            for value in (-bound, 0.0, bound)
        ),
    ]
    for number, pair in enumerate(pairs):
        y, result = ROW * number + ROW // 2, pair.result
        shows = result.is_test and (result.low > 0 or result.high < 0)
        color = "var(--accent)" if shows else "var(--soft)"
        parts += [
            f'<text x="{LABELS}" y="{y + 5}" text-anchor="end" fill="var(--ink)" font-size="14">'
            f"{escape_html(pair.label)}</text>",
            f'<line x1="{x(result.low)}" x2="{x(result.high)}" y1="{y}" y2="{y}" '
            f'stroke="{color}" stroke-width="3"/>',
            f'<circle cx="{x(result.mean)}" cy="{y}" r="5" fill="{color}"/>',
        ]
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="effects">{"".join(parts)}</svg></div>'
    )


def learning_charts(curves: Sequence[LearningCurves], study: StudyConfig) -> list[Chart]:
    """A chart for each domain: the mean validation loss of the first groups over the steps."""
    compared = dict.fromkeys(arm for pair in study.compare for arm in pair)
    order = sorted(curves, key=lambda c: c.group.split(", ")[0] not in compared)
    plotted = order[:MAX_GROUPS]
    charts = []
    for domain in curves[0].losses if curves else ():
        series = [
            curve(
                group.group,
                f"r{number}",
                DASHES[number % len(DASHES)],
                np.array(group.steps, float),
                group.losses[domain].mean(0),
                markers=True,
            )
            for number, group in enumerate(plotted)
        ]
        note = f"Mean over trainings; the first {MAX_GROUPS} groups." if order[MAX_GROUPS:] else ""
        charts.append(line_chart(domain, CROSS_ENTROPY, series, [], note=note))
    return charts
