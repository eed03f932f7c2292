"""The page: one HTML file without scripts and without anything from elsewhere. All text from data is escaped."""

from __future__ import annotations

from pocl_ds.report.figures import DARK, LIGHT, Figure, figures, ramp, subset_styles
from pocl_ds.report.read import MODELS, Example, Facts
from pocl_ds.report.style import STYLE
from pocl_ds.report.words import clock, escaped, headline, number, plan_rows, results_rows, shortened, training_line, versions


def html_page(facts: Facts, *, name: str, recipe_yaml: str) -> str:
    """The whole page."""
    title = escaped(name)
    charts = figures(facts)
    parts = [
        f'<header><p class="eyebrow">POCL distillation · run report</p><h1>{title}</h1>'
        f'<p class="lead">{escaped(headline(facts))}</p>{_tiles(facts)}</header>',
        _missing(facts),
        _results(facts),
        _curriculum(facts),
        _section("Training", training_line(facts),
                 [figure for figure in charts if not figure.legend or figure.legend[0][1] != "s0"]),
        _section("Difficulty", "How hard each training sample is for the initial student, and the subset it fell into.",
                 [figure for figure in charts if figure.legend and figure.legend[0][1] == "s0"]),
        _examples(facts),
        _times(facts),
        _provenance(facts, recipe_yaml),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Nothing may be fetched or run, whatever an answer contains.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
        f"<title>{title} · POCL report</title><style>{_style(facts)}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _style(facts: Facts) -> str:
    count = max(1, len(facts.ranking.bounds) - 1) if facts.ranking else 1
    light, dark = ramp(LIGHT, count), ramp(DARK, count)
    names = subset_styles(count)
    classes = "".join(f".{name}{{--c:var(--{name})}}" for name in names)
    variables = ["".join(f"--{name}:{colour};" for name, colour in zip(names, colours, strict=True)) for colours in (light, dark)]
    return STYLE + f":root{{{variables[0]}}}@media(prefers-color-scheme:dark){{:root{{{variables[1]}}}}}{classes}"


def _tiles(facts: Facts) -> str:
    """The numbers that one looks for first."""
    tiles = []
    models = facts.results["models"] if facts.results else {}
    student, initial, teacher = (models.get(name, {}) for name in ("student", "initial", "teacher"))

    def rouge(entry: dict) -> float | None:
        found = entry.get("benchmarks", {}).get(facts.benchmark)
        return None if found is None else found["rouge_l"]

    for label, values, digits in (
        (f"ROUGE-L, {facts.benchmark}", (rouge(student), rouge(initial), rouge(teacher)), 1),
        ("held-out loss, nats/token", (student.get("loss"), initial.get("loss"), teacher.get("loss")), 2),
        ("KL to teacher, nats/token", (student.get("kl"), initial.get("kl"), None), 2),
    ):
        if values[0] is None:
            continue
        beside = [f"{number(value, digits)} {word}" for value, word in zip(values[1:], ("before", "teacher"), strict=True)
                  if value is not None]  # fmt: skip
        tiles.append((label, number(values[0], digits), " · ".join(beside)))
    if facts.seconds:
        parts = dict(facts.seconds)
        training = f"{clock(parts['train'])} training" if "train" in parts else ""
        tiles.append(("time, all stages", clock(sum(parts.values())), training))
    cells = "".join(
        f'<div class="tile"><span>{escaped(label)}</span><b>{escaped(value)}</b><small>{escaped(beside)}</small></div>'
        for label, value, beside in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _missing(facts: Facts) -> str:
    lines = "".join(f"<li>{escaped(sentence)}</li>" for sentence in facts.missing)
    return f'<section class="missing"><ul>{lines}</ul></section>' if lines else ""


def _results(facts: Facts) -> str:
    if facts.results is None:
        return ""
    header, rows = results_rows(facts.results)
    seeds = len(facts.results["seeds"])
    note = f"ROUGE-L ×100, mean ± standard deviation over {seeds} seeds." if seeds > 1 else "ROUGE-L ×100, one seed."
    marked = [f'<tr class="m-{model}">{_cells(cells)}</tr>' for model, cells in rows]
    return f'<section><h2>Results</h2>{_table(header, "".join(marked))}<p class="note">{escaped(note)}</p></section>'


def _curriculum(facts: Facts) -> str:
    if facts.plan is None:
        return ""
    header, rows = plan_rows(facts.plan)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    text = f"Scheduler {facts.plan['scheduler']}, batches of {facts.plan['batch_size']} samples."
    return f'<section><h2>Curriculum</h2><p class="note">{escaped(text)}</p>{_table(header, body)}</section>'


def _section(title: str, text: str, charts: list[Figure]) -> str:
    if not charts:
        return ""
    note = f'<p class="note">{escaped(text)}</p>' if text else ""
    return f'<section><h2>{escaped(title)}</h2>{note}<div class="charts">{"".join(map(_figure, charts))}</div></section>'


def _figure(figure: Figure) -> str:
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 22 10"><path class="line {style}" d="M1 5H21"/></svg>{escaped(name)}</span>'
        for name, style in figure.legend
    )
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    note = f"<figcaption>{escaped(figure.note)}</figcaption>" if figure.note else ""
    wide = ' class="wide"' if figure.wide else ""
    return f'<figure{wide}><h3>{escaped(figure.title)}</h3>{legend}<div class="plot">{figure.svg}</div>{note}</figure>'


def _examples(facts: Facts) -> str:
    if not facts.examples:
        return ""
    cards = "".join(_example(i, example) for i, example in enumerate(facts.examples, 1))
    text = f"{len(facts.examples)} items of {facts.benchmark}, chosen by the hash of their id; the number is ROUGE-L ×100."
    return f'<section><h2>Answers</h2><p class="note">{escaped(text)}</p>{cards}</section>'


def _example(index: int, example: Example) -> str:
    answers = "".join(
        f'<div class="answer m-{model}"><h4>{escaped(MODELS[model])}<span class="score">{score:.0f}</span></h4>'
        f"<pre>{escaped(shortened(text)) if text.strip() else '<i>(empty)</i>'}</pre></div>"
        for model, (text, score) in example.answers.items()
    )
    references = "".join(f"<pre>{escaped(shortened(text))}</pre>" for text in example.references)
    return (
        f'<article><div class="asked"><span class="count">{index}</span>'
        f'<pre class="question">{escaped(shortened(example.question))}</pre></div>'
        f'<div class="answers"><div class="answer reference"><h4>reference</h4>{references}</div>{answers}</div></article>'
    )


def _times(facts: Facts) -> str:
    if not facts.seconds:
        return ""
    longest = max(seconds for _, seconds in facts.seconds) or 1.0
    rows = "".join(
        f'<tr><td>{escaped(stage)}</td><td class="meter"><i style="width:{100 * seconds / longest:.1f}%"></i></td>'
        f"<td>{escaped(clock(seconds))}</td></tr>"
        for stage, seconds in facts.seconds
    )
    return f'<section><h2>Time by stage</h2><div class="scroll"><table class="times">{rows}</table></div></section>'


def _provenance(facts: Facts, recipe_yaml: str) -> str:
    packages = "".join(
        f"<tr><td>{escaped(package)}</td><td>{escaped(version)}</td></tr>" for package, version in versions(facts).items()
    )
    prints = "".join(
        f"<tr><td>{escaped(stage)}</td><td><code>{escaped(manifest.fingerprint[:16])}</code></td></tr>"
        for stage, manifest in facts.manifests.items()
    )
    return (
        f"<section><h2>Provenance</h2><details><summary>Recipe</summary><pre>{escaped(recipe_yaml)}</pre></details>"
        f'<details><summary>Package versions</summary><table class="plain">{packages}</table></details>'
        f'<details><summary>Fingerprints of the stages</summary><table class="plain">{prints}</table></details></section>'
    )


def _table(header: list[str], body: str) -> str:
    head = "".join(f"<th>{escaped(name)}</th>" for name in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(cells: list[str]) -> str:
    return "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
