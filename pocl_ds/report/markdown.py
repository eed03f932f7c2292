"""The same in Markdown, without charts: for a terminal, an issue or a model card."""

from __future__ import annotations

from pocl_ds.report.read import MODELS, Example, Facts
from pocl_ds.report.words import clock, headline, markdown_cell, plan_rows, results_rows, shortened, training_line, versions


def markdown_page(facts: Facts, *, name: str, recipe_yaml: str) -> str:
    """The whole text."""
    parts = [f"# {markdown_cell(name)}", markdown_cell(headline(facts))]
    if facts.missing:
        parts.append("\n".join(f"- {markdown_cell(sentence)}" for sentence in facts.missing))
    if facts.results is not None:
        header, rows = results_rows(facts.results)
        seeds = len(facts.results["seeds"])
        spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        parts += ["## Results", _table(header, [cells for _, cells in rows]), f"ROUGE-L ×100, {spread}."]
    if facts.plan is not None:
        parts += ["## Curriculum", _table(*plan_rows(facts.plan))]
    if training := training_line(facts):
        parts += ["## Training", markdown_cell(training)]
    if facts.examples:
        models = [model for model in MODELS if model in facts.examples[0].answers]
        header = ["prompt", "reference", *(MODELS[model] for model in models)]
        parts += ["## Answers", _table(header, [_example(example, models) for example in facts.examples], align="---"),
                  "In brackets: ROUGE-L ×100."]  # fmt: skip
    if facts.seconds:
        parts += ["## Time by stage", _table(["stage", "time"], [[stage, clock(seconds)] for stage, seconds in facts.seconds])]
    found = ", ".join(f"{package} {version}" for package, version in versions(facts).items())
    parts += ["## Versions", markdown_cell(found), "## Recipe", _fenced(recipe_yaml)]
    return "\n\n".join(parts) + "\n"


def _example(example: Example, models: list[str]) -> list[str]:
    answers = [f"({example.answers[model][1]:.0f}) {shortened(example.answers[model][0].strip())}" for model in models]
    return [shortened(example.question), shortened("\n".join(example.references)), *answers]


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
