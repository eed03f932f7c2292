"""The results of `pocl bench gpu` as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pocl_ds.bench.gpu.machine import Machine
from pocl_ds.bench.gpu.parts import PARTS, Part
from pocl_ds.bench.gpu.rows import Row
from pocl_ds.report.formatting import ABSENT, escape_markdown

GIB = 2**30
# Header of a column, and its cell of a row; a cell that the row has no value for is ABSENT.
Columns = Sequence[tuple[str, Callable[[Row], str]]]


def results_page(results: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> str:
    """All results: the machines, then a section for each part that ran."""
    finished = [part for part in parts if part.name in results["parts"]]
    sections = [_part_section(part, results["parts"][part.name]) for part in finished]
    return "\n\n".join([*_machine_lines(results, finished), *sections]) + "\n"


def _machine_lines(results: Mapping[str, Any], parts: Sequence[Part]) -> list[str]:
    """A sentence for each setup, with its parts if there are several."""
    setups: list[tuple[Machine, list[str]]] = []
    for part in parts:
        machine = results["parts"][part.name]["machine"]
        names = next((names for known, names in setups if known == machine), None)
        if names is None:
            setups.append((machine, names := []))
        names.append(part.name)
    return [
        _machine_sentence(machine) + (f" Parts: {', '.join(names)}." if len(setups) > 1 else "")
        for machine, names in setups
    ]


def _machine_sentence(machine: Machine) -> str:
    packages = [f"{name} {version}" for name, version in machine["packages"].items()]
    if machine["dry_run"]:
        where = "**A dry run on a CPU with tiny shapes: its numbers say nothing about a GPU.**"
    else:
        where = f"{machine['card']}, driver {machine['driver']}, CUDA {machine['cuda']}."
    details = ", ".join([f"Python {machine['python']}", *packages])
    return f"{where} {details}. {machine['date']}, commit {machine['commit']}."


def _part_section(part: Part, result: Mapping[str, Any]) -> str:
    """Heading, why a part has no complete result, and its tables."""
    lines = [f"### {part.title}"]
    if result["status"] not in ("ok", "skipped"):
        lines.append(f"**{result['status']}**: {escape_markdown(result['reason'])}.")
    rows = summarize_tests(result["rows"]) if part.name == "conformance" else result["rows"]
    for group in dict.fromkeys(row.get("group") for row in rows):
        group_rows = [row for row in rows if row.get("group") == group]
        if group:
            lines.append(f"{escape_markdown(group)}:")
        lines.append(_table(COLUMNS[part.name.partition("-")[0]], group_rows))
    if not rows:
        lines.append("No row was measured.")
    return "\n\n".join(lines)


def summarize_tests(rows: Sequence[Row]) -> list[Row]:
    """A row for each test function: how many of its cases passed. Failed cases keep their rows, and
    a function without a case that ran keeps its first one.
    """
    summary: list[Row] = [row for row in rows if "error" in row]
    functions: dict[str, list[Row]] = {}
    for row in rows:
        if "error" not in row:
            functions.setdefault(row["name"].partition("[")[0], []).append(row)
    for name, cases in functions.items():
        passed = [row for row in cases if "skipped" not in row]
        if not passed:
            summary.append({**cases[0], "name": name})
            continue
        skipped = f", {len(cases) - len(passed)} skipped" if len(passed) < len(cases) else ""
        outcome = f"{len(passed)} passed{skipped}"
        duration = sum(row["duration"] for row in passed)
        summary.append({"name": name, "outcome": outcome, "duration": duration})
    return summary


def _table(columns: Columns, rows: Sequence[Row]) -> str:
    """A table. Of a row without a measurement, the second cell says why."""
    header = ["", *(name for name, _ in columns)]
    lines = [header, ["---", *["---:"] * len(columns)]]
    for row in rows:
        if reason := _reason(row):
            cells = [reason, *[""] * (len(columns) - 1)]
        else:
            cells = [_cell(render, row) for _, render in columns]
        lines.append([escape_markdown(row["name"]), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _reason(row: Row) -> str | None:
    if "skipped" in row:
        return f"skipped: {escape_markdown(row['skipped'])}"
    return f"failed: {escape_markdown(row['error'])}" if "error" in row else None


def _cell(render: Callable[[Row], str], row: Row) -> str:
    try:
        return render(row)
    except (KeyError, TypeError):  # the row has no such value, or None
        return ABSENT


def _milliseconds(row: Row) -> str:
    """Median (smallest..largest) of the row's seconds."""
    times = [1000 * second for second in row["seconds"]]
    digits = 0 if min(times) >= 100 else 1 if min(times) >= 10 else 2
    low, middle, high = (
        f"{value:.{digits}f}" for value in (min(times), statistics.median(times), max(times))
    )
    return f"{middle} ({low}..{high})"


def _gib(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / GIB:.2f}"


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: format(row[key], form)


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: escape_markdown(row[key])


# Columns of each part, after the name of a row.
COLUMNS: dict[str, Columns] = {
    "conformance": (("outcome", _text("outcome")), ("seconds", _number("duration", ".1f"))),
    "loss": (
        ("ms", _milliseconds),
        ("extra GiB", _gib("extra_bytes")),
        ("gradient error", _number("gradient_error", ".1e")),
    ),
    "attention": (
        ("ms", _milliseconds),
        ("extra GiB", _gib("extra_bytes")),
        ("error", _number("error_norm", ".1e")),
        ("kernel", _text("kernel")),
    ),
    "steps": (
        ("ms a step", _milliseconds),
        ("tokens/s", _number("tokens_per_second", ",.0f")),
        ("MFU", _number("mfu", ".1%")),
        ("peak GiB", _gib("peak_bytes")),
        ("peak / estimate", _number("memory_ratio", ".2f")),
        ("tokens/s / estimate", _number("speed_ratio", ".2f")),
    ),
    "pipeline": (("seconds", _number("duration", ".1f")), ("", _text("note"))),
    "vllm": (("", _text("value")),),
}
