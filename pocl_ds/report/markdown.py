"""The same in Markdown, without charts: for a terminal, an issue or a model card."""

from __future__ import annotations

from pocl_ds.config.yaml_io import plain_value
from pocl_ds.metrics.footnotes import footnotes
from pocl_ds.report.formatting import (
    detail_rows,
    headline,
    kl_lines,
    markdown_cell,
    mean_seen,
    plan_rows,
    results_rows,
    spent_rows,
    training_line,
    versions,
)
from pocl_ds.report.items import Item
from pocl_ds.report.run_summary import MODELS, Facts


def markdown_page(facts: Facts, *, name: str, recipe_yaml: str, examples: int) -> str:
    """The whole text, with `examples` items."""
    parts = [f"# {markdown_cell(name)}", markdown_cell(headline(facts))]
    if facts.missing:
        parts.append("\n".join(f"- {markdown_cell(sentence)}" for sentence in facts.missing))
    if facts.results is not None:
        header, rows = results_rows(facts.results)
        seeds = len(facts.results["seeds"])
        spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        parts += [
            "## Results",
            _table(header, [cells for _, cells in rows]),
            *map(
                markdown_cell,
                footnotes(facts.results) + kl_lines(facts.results, plain_value(recipe_yaml)),
            ),
            f"ROUGE-L ×100, {spread}.",
        ]
        header, details = detail_rows(facts)
        parts += [_table(header, [cells for _, _, cells in details])] if details else []
    if facts.plan is not None:
        parts += ["## Curriculum", _table(*plan_rows(facts.plan, mean_seen(facts)))]
    if training := training_line(facts):
        parts += ["## Training", markdown_cell(training)]
    if shown := facts.examples(examples):
        models = [model for model in MODELS if model in shown[0].answers]
        header = ["prompt", "reference", *(MODELS[model] for model in models)]
        parts += [
            "## Answers",
            _table(header, [_example(item, models) for item in shown], align="---"),
            "In brackets: ROUGE-L ×100.",
        ]
    if facts.spent:
        header = ["stage", "time", "processes", "host memory", "GPU memory"]
        parts += [
            "## Time and memory by stage",
            _table(header, spent_rows(facts.spent)),
            "Memory: the peak of one process.",
        ]
    found = ", ".join(f"{package} {version}" for package, version in versions(facts).items())
    parts += ["## Versions", markdown_cell(found), "## Recipe", _fenced(recipe_yaml)]
    return "\n\n".join(parts) + "\n"


def _example(item: Item, models: list[str]) -> list[str]:
    answers = [
        f"({item.answers[model][1]:.0f}) {item.answers[model][0].strip()}" for model in models
    ]
    return [item.question, "\n".join(item.references), *answers]


def _table(header: list[str], rows: list[list[str]], *, align: str = "---:") -> str:
    """Header and rows; the columns after the first are aligned as told, numbers to the right."""
    lines = [[markdown_cell(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---", *[align] * (len(header) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str) -> str:
    """A block whose fence is longer than any run of backticks in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"
