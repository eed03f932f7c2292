"""Tables of evaluation results, for the terminal and for Markdown."""

from __future__ import annotations

from typing import Any

from pocl_ds.metrics.footnotes import footnotes, mark_benchmark
from pocl_ds.metrics.result_columns import result_columns

# Model -> its label, in the order of the rows.
LABELS = {
    "initial": "student before",
    "student": "student after",
    "baseline": "student after plain KD",
    "teacher": "teacher",
}


def markdown_table(results: dict[str, Any]) -> str:
    """Results in Markdown, with the footnotes of marked benchmarks below."""
    rows = table_rows(results)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    for line in footnotes(results):
        lines += ["", line]
    return "\n".join(lines)


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """A header and one row per model: loss and KL in nats per token, correct answers and ROUGE-L in
    percent.
    """
    models = results["models"]
    benchmarks = list(
        dict.fromkeys(name for entry in models.values() for name in entry["benchmarks"])
    )
    columns = result_columns(results, benchmarks)
    titles = {"correct": "% correct", "rouge_l": "ROUGE-L"}
    header = [
        "",
        "loss/token",
        "KL to teacher",
        *(f"{titles[measure]} {mark_benchmark(name, results)}" for measure, name in columns),
    ]
    rows = [header]
    for model, label in LABELS.items():
        if model in models:
            entry = models[model]
            scores = [_format_score(entry["benchmarks"].get(name), key) for key, name in columns]
            loss, kl = (_format_number(entry.get(key), 3) for key in ("loss", "kl"))
            rows.append([label, loss, kl, *scores])
    return rows


def _format_score(entry: dict[str, Any] | None, measure: str) -> str:
    if entry is None or measure not in entry:
        return "–"
    deviation = entry[f"{measure}_deviation"]
    score = _format_number(entry[measure], 2)
    return score + (f" ± {deviation:.2f}" if deviation is not None else "")


def _format_number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
