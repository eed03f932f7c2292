"""The report in Markdown, without charts: for a terminal, an issue or a model card."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.metrics.footnotes import footnotes
from pocl_ds.report.formatting import (
    COST_HEADER,
    benchmark_rows,
    cost_rows,
    escape_markdown,
    headline,
    kl_footnotes,
    mean_visits,
    package_versions,
    plan_rows,
    results_note,
    results_rows,
    training_sentence,
)
from pocl_ds.report.items import Item
from pocl_ds.report.run_summary import MODEL_LABELS, RunSummary
from pocl_ds.report.stage_rankings import RANKING_NOTE, ranking_rows
from pocl_ds.runtime.formatting import code_block


def markdown_page(summary: RunSummary, *, name: str, recipe_yaml: str, num_examples: int) -> str:
    """The whole text, with `num_examples` evaluated items."""
    parts = [f"# {escape_markdown(name)}", escape_markdown(headline(summary))]
    if summary.missing:
        parts.append("\n".join(f"- {escape_markdown(sentence)}" for sentence in summary.missing))
    parts += _results(summary, recipe_yaml)
    if summary.plan is not None:
        header, rows = plan_rows(summary.plan, mean_visits(summary))
        parts += ["## Curriculum", _table(header, rows)]
        if summary.stage_rankings:
            parts += [RANKING_NOTE, _table(*ranking_rows(summary.stage_rankings))]
    if training := training_sentence(summary):
        parts += ["## Training", escape_markdown(training)]
    if items := summary.examples(num_examples):
        models = [model for model in MODEL_LABELS if model in items[0].answers]
        header = ["prompt", "reference", *(MODEL_LABELS[model] for model in models)]
        rows = [_example(item, models) for item in items]
        parts += ["## Answers", _table(header, rows, align="---"), "In brackets: ROUGE-L ×100."]
    if summary.step_costs:
        parts += [
            "## Time and memory by step",
            _table(COST_HEADER, cost_rows(summary.step_costs)),
            "Memory: the peak of one process.",
        ]
    versions = ", ".join(
        f"{package} {version}" for package, version in package_versions(summary).items()
    )
    parts += [
        "## Versions",
        escape_markdown(versions),
        "## Recipe",
        code_block(recipe_yaml, "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def _results(summary: RunSummary, recipe_yaml: str) -> list[str]:
    """The tables of results, with footnotes."""
    if summary.results is None:
        return []
    header, rows = results_rows(summary.results)
    notes = [
        *footnotes(summary.results),
        *kl_footnotes(summary.results, parse_yaml(recipe_yaml)),
    ]
    parts = [
        "## Results",
        _table(header, [cells for _, cells in rows]),
        *map(escape_markdown, notes),
        results_note(summary.results),
    ]
    header, details = benchmark_rows(summary)
    if details:
        parts.append(_table(header, [cells for _, _, cells in details]))
    return parts


def _example(item: Item, models: Sequence[str]) -> list[str]:
    answers = [item.answers[model] for model in models]
    texts = [f"({answer.rouge_l:.0f}) {answer.text.strip()}" for answer in answers]
    return [item.prompt, "\n".join(item.references), *texts]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "---:") -> str:
    """A table. align: alignment of all columns but the first; default: right, for numbers."""
    lines = [[escape_markdown(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---", *[align] * (len(header) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
