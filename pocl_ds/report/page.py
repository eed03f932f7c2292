"""The HTML page of one run. Tables are HTML; charts and lists are data that the scripts show."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.metrics.footnotes import footnotes, mark_benchmark
from pocl_ds.report.charts import difficulty_charts, subset_bounds, training_charts, visit_charts
from pocl_ds.report.document import (
    bar_cell,
    chart_figures,
    details,
    filter_list,
    html_document,
    html_rows,
    html_table,
    page_header,
    paragraph_note,
    preformatted,
    row_cells,
    section,
)
from pocl_ds.report.formatting import (
    COST_HEADER,
    about_rows,
    benchmark_rows,
    cost_rows,
    escape_html,
    format_number,
    format_size,
    headline,
    kl_footnotes,
    mean_visits,
    package_versions,
    plan_rows,
    results_note,
    results_rows,
    source_rows,
    training_sentence,
)
from pocl_ds.report.items import BenchmarkItems
from pocl_ds.report.run_summary import MODEL_LABELS, RunSummary
from pocl_ds.report.stage_rankings import RANKING_NOTE, ranking_rows
from pocl_ds.runtime.formatting import format_duration

SAMPLE_MENUS = (("subset", "Subset"), ("sort", "Order"))
ITEM_MENUS = (
    ("benchmark", "Benchmark"),
    ("left", "Items where"),
    ("relation", "is"),
    ("right", "compared with"),
)
ZOOM_NOTE = (
    "Drag over a chart to zoom in, double-click to zoom out. Keyboard: arrows, + and −, Escape."
)


def html_page(summary: RunSummary, *, name: str, recipe_yaml: str) -> str:
    """The whole page."""
    recipe = parse_yaml(recipe_yaml)
    difficulty, training = difficulty_charts(summary), training_charts(summary)
    visits = visit_charts(summary)
    html = "".join(
        [
            page_header("run report", name, headline(summary)),
            missing_list(summary.missing),
            _tiles(summary),
            _about(summary, recipe),
            _results(summary, recipe),
            _curriculum(summary, chart_figures(visits, len(difficulty) + len(training))),
            _difficulty(summary, chart_figures(difficulty, 0)),
            _samples(summary),
            section(
                "Training",
                chart_figures(training, len(difficulty)),
                anchor="training",
                note=f"{training_sentence(summary)} {ZOOM_NOTE}".strip(),
            ),
            _answers(summary),
            _costs(summary),
            _provenance(summary, recipe_yaml),
        ]
    )
    bounds = _bounds(summary)
    data = {
        "charts": difficulty + training + visits,
        "samples": _sample_data(summary, bounds),
        "items": [
            item_data(benchmark, {model: MODEL_LABELS[model] for model in benchmark.intervals})
            for benchmark in summary.benchmarks
        ],
    }
    return html_document(name, html, data, subsets=max(1, len(bounds) - 1))


def item_data(benchmark: BenchmarkItems, labels: Mapping[str, str]) -> dict[str, Any]:
    """A benchmark's items by column, for the script. labels: model -> its label."""
    items, models = benchmark.items, list(benchmark.intervals)
    return {
        "name": benchmark.name,
        "models": [labels[model] for model in models],
        "ids": [item.id for item in items],
        "prompts": [item.prompt for item in items],
        "references": [item.references for item in items],
        "answers": [[item.answers[model].text for item in items] for model in models],
        "scores": [
            [round(item.answers[model].mean_rouge_l, 2) for item in items] for model in models
        ],
    }


def missing_list(sentences: Sequence[str]) -> str:
    """A box that names what is missing or not comparable."""
    if not sentences:
        return ""
    lines = "".join(f"<li>{escape_html(sentence)}</li>" for sentence in sentences)
    return f'<section class="missing" aria-label="what is missing"><ul>{lines}</ul></section>'


def _tiles(summary: RunSummary) -> str:
    """The most important numbers."""
    models = summary.results["models"] if summary.results else {}
    student, initial, teacher = (models.get(name, {}) for name in ("student", "initial", "teacher"))

    def rouge(entry: dict[str, Any]) -> float | None:
        benchmark = entry.get("benchmarks", {}).get(summary.main_benchmark)
        return None if benchmark is None else benchmark["rouge_l"]

    # Results: the student's value, and for comparison those of the initial student and the teacher.
    benchmark = mark_benchmark(summary.main_benchmark, summary.results or {})
    tiles = []
    for label, value, initial_value, teacher_value, digits in (
        (f"ROUGE-L, {benchmark}", rouge(student), rouge(initial), rouge(teacher), 1),
        (
            "held-out loss, nats/token",
            student.get("loss"),
            initial.get("loss"),
            teacher.get("loss"),
            2,
        ),
        ("KL to teacher, nats/token", student.get("kl"), initial.get("kl"), None, 2),
    ):
        if value is not None:
            context = [
                f"{format_number(number, digits)} {name}"
                for number, name in ((initial_value, "before"), (teacher_value, "teacher"))
                if number is not None
            ]
            tiles.append((label, format_number(value, digits), " · ".join(context)))

    # Time and memory.
    if summary.step_costs:
        seconds = {cost.step: cost.seconds for cost in summary.step_costs}
        context_text = f"{format_duration(seconds['train'])} training" if "train" in seconds else ""
        tiles.append(("time, all steps", format_duration(summary.total_seconds), context_text))
    if host := summary.train_info.get("peak_host_bytes"):
        device = summary.train_info.get("peak_device_bytes")
        kind = "GPU" if device else "host"
        tiles.append(("peak memory of a rank", format_size(device or host), f"{kind}, training"))
    html = "".join(
        f'<div class="tile"><span>{escape_html(label)}</span><b>{escape_html(value)}</b>'
        f"<small>{escape_html(context)}</small></div>"
        for label, value, context in tiles
    )
    return f'<div class="tiles">{html}</div>' if html else ""


def _about(summary: RunSummary, recipe: dict[str, Any]) -> str:
    """Models, data and method."""
    rows = about_rows(summary, recipe)
    if not rows:
        return ""
    pairs = "".join(
        f"<div><dt>{escape_html(label)}</dt><dd>{escape_html(value)}</dd></div>"
        for label, value in rows
    )
    return f'<section class="about" aria-label="about the run"><dl>{pairs}</dl></section>'


def _results(summary: RunSummary, recipe: dict[str, Any]) -> str:
    if summary.results is None:
        return ""
    # One row per model.
    header, rows = results_rows(summary.results)
    model_rows = "".join(f'<tr class="m-{model}">{row_cells(cells)}</tr>' for model, cells in rows)
    notes = [*footnotes(summary.results), *kl_footnotes(summary.results, recipe)]
    notes.append(
        f"{results_note(summary.results)} The interval is a bootstrap over items: it shows how far "
        "other items would move the mean."
    )
    # All measures, one row per benchmark and model.
    details_header, details_rows = benchmark_rows(summary)
    html = "".join(
        f'<tr class="m-{model}" data-row="{escape_html(name)}">{row_cells(cells)}</tr>'
        for model, name, cells in details_rows
    )
    menu = (
        '<div class="controls"><label>Benchmark'
        '<select id="benchmarks" aria-controls="details"></select></label></div>'
    )
    details_html = (
        f'<div id="details">{menu if len(summary.benchmarks) > 1 else ""}'
        f"{html_table(details_header, html, caption='by benchmark')}</div>"
    )
    return section(
        "Results",
        html_table(header, model_rows, caption="models"),
        *map(paragraph_note, notes),
        details_html if details_rows else "",
        anchor="results",
    )


def _curriculum(summary: RunSummary, figures: str) -> str:
    if summary.plan is None:
        return ""
    header, rows = plan_rows(summary.plan, mean_visits(summary))
    rankings = ""
    if summary.stage_rankings:
        ranking_header, ranked = ranking_rows(summary.stage_rankings)
        rankings = paragraph_note(RANKING_NOTE)
        rankings += html_table(ranking_header, html_rows(ranked), caption="stage rankings")
    return section(
        "Curriculum",
        html_table(header, html_rows(rows), caption="stages"),
        rankings,
        figures,
        anchor="curriculum",
        note=f"Scheduler {summary.plan['scheduler']}, {summary.plan['batch_size']} samples per "
        "optimizer step.",
    )


def _difficulty(summary: RunSummary, figures: str) -> str:
    header, rows = source_rows(summary)
    note = "How hard each sample is for the initial student, and its subset."
    if rows:
        note += " The mean place is 0 for the easiest and 1 for the hardest samples."
    table = html_table(header, html_rows(rows), caption="sources") if rows else ""
    return section("Difficulty", table, figures, anchor="difficulty", note=note)


def _samples(summary: RunSummary) -> str:
    if summary.samples is None or not summary.samples.rows:
        return ""
    row_count, total = len(summary.samples.rows), summary.samples.total
    note = (
        f"All {total:,} samples."
        if row_count == total
        else f"{row_count:,} of {total:,} samples, evenly spaced along the ranking "
        "(report.max_samples, report.max_text_mb)."
    )
    return section(
        "Training samples",
        filter_list("samples", SAMPLE_MENUS),
        anchor="samples",
        note=f"{note} Long texts are truncated.",
    )


def _sample_data(summary: RunSummary, bounds: list[int]) -> dict[str, Any] | None:
    """The training samples by column, for the script."""
    if summary.samples is None:
        return None
    rows, ranking, visits = summary.samples.rows, summary.ranking, summary.sample_visits
    positions = [row.position for row in rows]
    rouge_l = cross_entropy = None
    if ranking is not None:
        rouge_l = [round(100 * float(ranking.rouge_l[i]), 1) for i in positions]
        cross_entropy = [round(float(ranking.cross_entropy[i]), 3) for i in positions]
    return {
        "bounds": bounds,
        "positions": positions,
        "ids": [row.id for row in rows],
        "prompts": [row.prompt for row in rows],
        "references": [row.reference for row in rows],
        "responses": [row.response for row in rows],
        "rouge_l": rouge_l,
        "cross_entropy": cross_entropy,
        "visits": None if visits is None else [int(visits[i]) for i in positions],
    }


def _bounds(summary: RunSummary) -> list[int]:
    """Bounds of the subsets, empty if they are not known."""
    if summary.ranking:
        return summary.ranking.bounds
    return subset_bounds(summary.plan) if summary.plan else []


def _answers(summary: RunSummary) -> str:
    if not any(benchmark.items for benchmark in summary.benchmarks):
        return ""
    counts = ", ".join(
        f"{len(benchmark.items):,} of {benchmark.total:,} of {benchmark.name}"
        for benchmark in summary.benchmarks
    )
    note = (
        f"Items: {counts}, chosen by the hash of their ids (report.max_items, "
        "report.max_text_mb). Scores are ROUGE-L ×100, mean over seeds; texts are those of the "
        "first seed, long ones are truncated."
    )
    return section("Answers", filter_list("items", ITEM_MENUS), anchor="answers", note=note)


def _costs(summary: RunSummary) -> str:
    """Time and memory by step."""
    if not summary.step_costs:
        return ""
    longest = max(cost.seconds for cost in summary.step_costs) or 1.0
    html = ""
    for cost, (step, *cells) in zip(summary.step_costs, cost_rows(summary.step_costs), strict=True):
        cells_html = "".join(f"<td>{escape_html(cell)}</td>" for cell in cells)
        html += f"<tr>{row_cells([step])}{bar_cell(cost.seconds / longest)}{cells_html}</tr>"
    return section(
        "Time and memory",
        html_table([COST_HEADER[0], "", *COST_HEADER[1:]], html, css="times", caption="by step"),
        anchor="time",
        note="Memory is the peak of one process; a dash means that the step did not record it.",
    )


def _provenance(summary: RunSummary, recipe_yaml: str) -> str:
    """Recipe, versions, fingerprints, and cluster jobs."""
    fingerprints = [
        (step, manifest.fingerprint[:16]) for step, manifest in summary.manifests.items()
    ]
    parts = [
        details("Recipe", preformatted(recipe_yaml)),
        details("Package versions", _pairs(list(package_versions(summary).items()))),
        details("Fingerprints of the steps", _pairs(fingerprints)),
    ]
    if resumed_at := summary.train_info.get("resumed_at"):
        text = f"The process that finished training started after optimizer step {resumed_at:,}."
        parts.append(details("Resumed", f"<p>{text}</p>"))
    submission, attempts = summary.history.submission, summary.history.attempts
    if submission:
        keys = ("profile", "code", "recipe", "python", "directory")
        pairs = [(key, str(submission[key])) for key in keys if key in submission]
        parts.append(details("Submission", _pairs(pairs)))
    if attempts:
        header = ["job", "attempt", "id", "nodes", "start", "duration", "progress", "outcome"]
        rows = html_rows([_attempt_row(attempt) for attempt in attempts])
        table = html_table([*header, "reason"], rows, caption="attempts")
        title = f"Jobs and attempts ({len(attempts)}, {summary.history.restarts} restarts)"
        parts.append(details(title, table))
    return section("Provenance", *parts, anchor="provenance")


def _attempt_row(attempt: dict[str, Any]) -> list[object]:
    start = time.strftime("%Y-%m-%d %H:%M", time.gmtime(attempt["start"])) + " UTC"
    end = attempt["end"]
    return [
        attempt["label"],
        attempt["number"],
        attempt.get("job", ""),
        " ".join(attempt["nodes"]),
        start,
        format_duration(end - attempt["start"]) if end else "end unknown",
        attempt.get("progress", ""),
        attempt.get("outcome", ""),
        attempt.get("reason") or attempt.get("error", ""),
    ]


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape_html(name)}</th>'
        f"<td><code>{escape_html(value)}</code></td></tr>"
        for name, value in pairs
    )
    return f'<table class="plain">{rows}</table>'
