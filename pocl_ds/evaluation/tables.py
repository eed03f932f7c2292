"""Results as tables, for the terminal and for Markdown."""

from __future__ import annotations

from typing import Any

from pocl_ds.metrics.footnotes import footnotes, mark_benchmark

ROWS = (
    ("initial", "student before"),
    ("student", "student after"),
    ("baseline", "student after plain KD"),
    ("teacher", "teacher"),
)


def markdown_table(results: dict[str, Any]) -> str:
    """Results in Markdown, with the footnotes of marked benchmarks below."""
    rows = table_rows(results)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    for line in footnotes(results):
        lines += ["", line]
    return "\n".join(lines)


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Header and one row a model: held-out loss and KL a token in nats, ROUGE-L x 100 a benchmark."""
    models = results["models"]
    benchmarks = list(
        dict.fromkeys(name for entry in models.values() for name in entry["benchmarks"])
    )
    rows = [
        [
            "",
            "loss/token",
            "KL to teacher",
            *(f"ROUGE-L {mark_benchmark(name, results)}" for name in benchmarks),
        ]
    ]
    for model, label in ROWS:
        if model in models:
            entry = models[model]
            scores = [_score(entry["benchmarks"].get(name)) for name in benchmarks]
            rows.append(
                [label, _number(entry.get("loss"), 3), _number(entry.get("kl"), 3), *scores]
            )
    return rows


def _score(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    deviation = entry["rouge_l_deviation"]
    return _number(entry["rouge_l"], 2) + (f" ± {deviation:.2f}" if deviation is not None else "")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
