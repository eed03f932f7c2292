"""The page of one run. Tables are HTML, escaped here; charts and lists are data, which the scripts
show as text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pocl_ds.config.yaml_io import plain_value
from pocl_ds.metrics.footnotes import footnotes, mark_benchmark
from pocl_ds.report.charts import difficulty_charts, seen_charts, subset_bounds, training_charts
from pocl_ds.report.document import bar, browser, cells, document, figures, folded, section, table
from pocl_ds.report.formatting import (
    about_rows,
    detail_rows,
    escaped,
    headline,
    kl_lines,
    mean_seen,
    number,
    plan_rows,
    results_rows,
    size,
    training_line,
    versions,
)
from pocl_ds.report.items import Benchmark
from pocl_ds.report.run_summary import MODELS, Facts
from pocl_ds.runtime.formatting import format_duration

SAMPLE_MENUS = (("subset", "Subset"), ("sort", "Order"))
ITEM_MENUS = (
    ("benchmark", "Benchmark"),
    ("left", "Items where"),
    ("relation", "is"),
    ("right", "than"),
)


def html_page(facts: Facts, *, name: str, recipe_yaml: str) -> str:
    """The whole page."""
    recipe = plain_value(recipe_yaml)
    training, difficulty, seen = (
        training_charts(facts),
        difficulty_charts(facts),
        seen_charts(facts),
    )
    body = "".join(
        [
            f'<header><p class="eyebrow">POCL distillation · run report</p><h1>{escaped(name)}</h1>'
            f'<p class="lead">{escaped(headline(facts))}</p></header>',
            missing(facts.missing),
            tiles(facts),
            about(facts, recipe),
            _results(facts, recipe),
            _curriculum(facts, figures(seen, len(difficulty) + len(training))),
            section(
                "Difficulty",
                figures(difficulty, 0),
                anchor="difficulty",
                note="How hard each sample is for the initial student, and the subset it fell into.",
            ),
            _samples(facts),
            section(
                "Training",
                figures(training, len(difficulty)),
                anchor="training",
                note=f"{training_line(facts)} Drag over a chart to zoom in, twice a click to zoom "
                f"out; with the keyboard: "
                "arrows, + and −, Escape.".strip(),
            ),
            _items(facts),
            spent(facts),
            _provenance(facts, recipe_yaml),
        ]
    )
    bounds = _bounds(facts)
    data = {
        "charts": difficulty + training + seen,
        "samples": _sample_data(facts, bounds),
        "items": [
            item_data(one, {m: MODELS[m] for m in one.intervals}) for one in facts.benchmarks
        ],
    }
    return document(name, body, data, subsets=max(1, len(bounds) - 1))


def item_data(benchmark: Benchmark, names: Mapping[str, str]) -> dict[str, Any]:
    """A benchmark's items, by column. names: model -> what the page calls it."""
    items = benchmark.items
    return {
        "name": benchmark.name,
        "models": [names[model] for model in benchmark.intervals],
        "ids": [item.id for item in items],
        "questions": [item.question for item in items],
        "references": [item.references for item in items],
        "answers": [[item.answers[model][0] for item in items] for model in benchmark.intervals],
        "scores": [
            [round(item.answers[model][2], 2) for item in items] for model in benchmark.intervals
        ],
    }


def missing(sentences: list[str]) -> str:
    """What is not there, or stands on weak feet."""
    lines = "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences)
    return (
        f'<section class="missing" aria-label="what is missing"><ul>{lines}</ul></section>'
        if lines
        else ""
    )


def tiles(facts: Facts) -> str:
    """The numbers that one looks for first."""
    models = facts.results["models"] if facts.results else {}
    student, initial, teacher = (models.get(name, {}) for name in ("student", "initial", "teacher"))

    def rouge(entry: dict) -> float | None:
        found = entry.get("benchmarks", {}).get(facts.benchmark)
        return None if found is None else found["rouge_l"]

    found = []
    for label, values, digits in (
        (
            f"ROUGE-L, {marked(facts.benchmark, facts.results or {})}",
            (rouge(student), rouge(initial), rouge(teacher)),
            1,
        ),
        (
            "held-out loss, nats/token",
            (student.get("loss"), initial.get("loss"), teacher.get("loss")),
            2,
        ),
        ("KL to teacher, nats/token", (student.get("kl"), initial.get("kl"), None), 2),
    ):
        if values[0] is not None:
            beside = [
                f"{number(value, digits)} {word}"
                for value, word in zip(values[1:], ("before", "teacher"), strict=True)
                if value is not None
            ]
            found.append((label, number(values[0], digits), " · ".join(beside)))
    if facts.spent:
        parts = {one.stage: one for one in facts.spent}
        training = f"{format_duration(parts['train'].seconds)} training" if "train" in parts else ""
        found.append(("time, all stages", format_duration(sum(one.seconds for one in facts.spent)), training))
    if "train" in facts.manifests and (
        peak := facts.manifests["train"].info.get("peak_host_bytes")
    ):
        device = facts.manifests["train"].info.get("peak_device_bytes")
        found.append(
            (
                "memory of a rank",
                size(device or peak),
                "GPU, training" if device else "host, training",
            )
        )
    body = "".join(
        f'<div class="tile"><span>{escaped(label)}</span><b>{escaped(value)}</b><small>{escaped(beside)}</small></div>'
        for label, value, beside in found
    )
    return f'<div class="tiles">{body}</div>' if body else ""


def about(facts: Facts, recipe: dict[str, Any]) -> str:
    """What was distilled with what."""
    pairs = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in about_rows(facts, recipe)
    )
    return (
        f'<section class="about" aria-label="about the run"><dl>{pairs}</dl></section>'
        if pairs
        else ""
    )


def spent(facts: Facts) -> str:
    """Time and memory by stage."""
    longest = max((one.seconds for one in facts.spent), default=0) or 1.0
    rows = "".join(
        f"<tr>{cells([one.stage])}{bar(one.seconds / longest)}<td>{escaped(format_duration(one.seconds))}</td><td>{one.processes}</td>"
        f"<td>{size(one.host_bytes)}</td><td>{size(one.device_bytes)}</td></tr>"
        for one in facts.spent
    )
    if not rows:
        return ""
    header = ["stage", "", "time", "processes", "host memory", "GPU memory"]
    return section(
        "Time and memory",
        table(header, rows, css="times", caption="by stage"),
        anchor="time",
        note="Memory is the peak of one process; a dash where the stage did not record it.",
    )


def _bounds(facts: Facts) -> list[int]:
    if facts.ranking:
        return facts.ranking.bounds
    return subset_bounds(facts.plan) if facts.plan else []


def _results(facts: Facts, recipe: dict[str, Any]) -> str:
    if facts.results is None:
        return ""
    header, rows = results_rows(facts.results)
    seeds = len(facts.results["seeds"])
    note = (
        f"ROUGE-L ×100, mean ± standard deviation over {seeds} seeds."
        if seeds > 1
        else "ROUGE-L ×100, one seed."
    )
    main = "".join(f'<tr class="m-{model}">{cells(row)}</tr>' for model, row in rows)
    header_2, details = detail_rows(facts)
    body = "".join(
        f'<tr class="m-{model}" data-row="{escaped(name)}">{cells(row)}</tr>'
        for model, name, row in details
    )
    menu = (
        '<div class="controls"><label>Benchmark<select id="benchmarks" aria-controls="details"></select></label></div>'
        if len(facts.benchmarks) > 1
        else ""
    )
    more = (
        f'<div id="details">{menu}{table(header_2, body, caption="by benchmark")}</div>'
        if details
        else ""
    )
    why = "The interval is a bootstrap over items of their mean over seeds: it says how much other questions might change."
    said = "".join(
        f'<p class="note">{escaped(line)}</p>'
        for line in footnotes(facts.results) + kl_lines(facts.results, recipe)
    )
    return section(
        "Results",
        table(header, main, caption="models"),
        said,
        f'<p class="note">{escaped(note)} {why}</p>',
        more,
        anchor="results",
    )


def _curriculum(facts: Facts, charts: str) -> str:
    if facts.plan is None:
        return ""
    header, rows = plan_rows(facts.plan, mean_seen(facts))
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    text = f"Scheduler {facts.plan['scheduler']}, batches of {facts.plan['batch_size']} samples."
    return section(
        "Curriculum", table(header, body, caption="stages"), charts, anchor="curriculum", note=text
    )


def _samples(facts: Facts) -> str:
    if facts.samples is None or not facts.samples.rows:
        return ""
    shown, total = len(facts.samples.rows), facts.samples.total
    note = (
        f"All {total:,} samples."
        if shown == total
        else (
            f"{shown:,} of {total:,} samples, evenly along the order: the page holds no more "
            f"(report.max_samples, report.max_text_mb)."
        )
    )
    return section(
        "Training samples",
        browser("samples", SAMPLE_MENUS),
        anchor="samples",
        note=f"{note} Long texts are cut.",
    )


def _sample_data(facts: Facts, bounds: list[int]) -> dict[str, Any] | None:
    if facts.samples is None:
        return None
    rows, ranking = facts.samples.rows, facts.ranking
    return {
        "bounds": bounds,
        "places": [row.place for row in rows],
        "ids": [row.id for row in rows],
        "prompts": [row.prompt for row in rows],
        "references": [row.reference for row in rows],
        "responses": [row.response for row in rows],
        "rouge": [round(100 * float(ranking.rouge_l[row.place]), 1) for row in rows]
        if ranking
        else None,
        "entropy": [round(float(ranking.cross_entropy[row.place]), 3) for row in rows]
        if ranking
        else None,
        "seen": [int(facts.seen[row.place]) for row in rows] if facts.seen is not None else None,
    }


def _items(facts: Facts) -> str:
    if not any(one.items for one in facts.benchmarks):
        return ""
    counts = ", ".join(
        f"{len(one.items):,} of {one.total:,} of {one.name}" for one in facts.benchmarks
    )
    note = (
        f"Items: {counts}, chosen by the hash of their id (report.items, report.max_text_mb). The "
        f"number is ROUGE-L ×100, mean "
        "over seeds; the text is of the first seed, long ones are cut."
    )
    return section("Answers", browser("items", ITEM_MENUS), anchor="answers", note=note)


def _provenance(facts: Facts, recipe_yaml: str) -> str:
    prints = [(stage, manifest.fingerprint[:16]) for stage, manifest in facts.manifests.items()]
    parts = [
        folded("Recipe", f'<pre tabindex="0">{escaped(recipe_yaml)}</pre>'),
        folded("Package versions", _pairs(list(versions(facts).items()))),
        folded("Fingerprints of the stages", _pairs(prints)),
    ]
    history, info = (
        facts.history,
        facts.manifests["train"].info if "train" in facts.manifests else {},
    )
    if info.get("resumed_at"):
        parts.append(
            folded(
                "Resumed",
                f"<p>The process that finished training began after step "
                f"{info['resumed_at']:,}.</p>",
            )
        )
    if history.submission:
        kept = ("profile", "code", "recipe", "python", "directory")
        known = [(key, str(history.submission[key])) for key in kept if key in history.submission]
        parts.append(folded("Submission", _pairs(known)))
    if history.attempts:
        title = f"Jobs and attempts ({len(history.attempts)}, {history.restarts} restarts)"
        parts.append(
            folded(
                title,
                table(
                    [
                        "job",
                        "attempt",
                        "id",
                        "nodes",
                        "began",
                        "took",
                        "progress",
                        "outcome",
                        "reason",
                    ],
                    "".join(map(_attempt, history.attempts)),
                    caption="attempts",
                ),
            )
        )
    return section("Provenance", *parts, anchor="provenance")


def _attempt(attempt: dict[str, Any]) -> str:
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(attempt["start"])) + " UTC"
    took = format_duration(attempt["end"] - attempt["start"]) if attempt["end"] else "end unknown"
    fields = ("outcome", "reason")
    row = [
        attempt["label"],
        attempt["number"],
        attempt.get("job", ""),
        " ".join(attempt["nodes"]),
        began,
        took,
        attempt.get("progress", ""),
        *(attempt.get(field) or attempt.get("error", "") for field in fields),
    ]
    return f"<tr>{cells(row)}</tr>"


def _pairs(pairs: list[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td><code>{escaped(value)}</code></td></tr>'
        for name, value in pairs
    )
    return f'<table class="plain">{rows}</table>'
