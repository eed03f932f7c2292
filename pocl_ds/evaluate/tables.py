"""Results as a table of texts: for the terminal, for Markdown, and (in results.json) for the report."""

from __future__ import annotations

from typing import Any

# Rows in the order in which a reader compares them.
ROWS = {
    "initial": "student before",
    "student": "student after",
    "baseline": "plain KD",
    "teacher": "teacher",
}
ABSENT = "–"


def table(results: dict[str, Any]) -> dict[str, Any]:
    """Columns and rows of texts from results: {"columns": [..], "rows": [{"model", "cells"}, ..]}.

    Held-out loss and KL are nats per token, ROUGE-L is x100, mean ± sample standard deviation over seeds.
    """
    models: dict[str, Any] = results["models"]
    benchmarks = list(dict.fromkeys(name for model in models.values() for name in model["benchmarks"]))
    with_loss = any(model["held_out"] for model in models.values())
    with_kl = with_loss and "teacher" in models
    columns = ["model"]
    if with_loss:
        columns.append("held-out loss / token")
    if with_kl:
        columns.append("KL to teacher / token")
    columns += [f"ROUGE-L {name}" for name in benchmarks]
    rows = []
    for model, label in ROWS.items():
        if model not in models:
            continue
        held_out = models[model]["held_out"] or {}
        cells = [label]
        if with_loss:
            cells.append(_number(held_out.get("loss"), 3))
        if with_kl:
            cells.append(_number(held_out.get("kl"), 3))
        cells += [_spread(models[model]["benchmarks"].get(name)) for name in benchmarks]
        rows.append({"model": model, "cells": cells})
    return {"columns": columns, "rows": rows}


def results_table(results: dict[str, Any]) -> str:
    """Plain text with aligned columns, names to the left and numbers to the right."""
    tree = table(results)
    lines = [tree["columns"], *(row["cells"] for row in tree["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(tree["columns"]))]

    def aligned(line: list[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([aligned(lines[0]), rule, *map(aligned, lines[1:])]) + "\n"


def markdown_table(results: dict[str, Any]) -> str:
    """The same table in Markdown."""
    tree = table(results)
    lines = [tree["columns"], ["---", *["---:"] * (len(tree["columns"]) - 1)], *(row["cells"] for row in tree["rows"])]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _spread(measures: dict[str, Any] | None) -> str:
    if measures is None:
        return ABSENT
    rouge = measures["rouge_l"]
    mean = f"{rouge['mean']:.2f}"
    return mean if rouge["sd"] is None else f"{mean} ± {rouge['sd']:.2f}"
