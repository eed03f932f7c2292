"""Tables of results: order of rows, missing values, equal numbers of cells."""

from __future__ import annotations

from typing import Any

from pocl_ds.evaluation.tables import markdown_table, table_rows


def entry(rouge: float, deviation: float | None, **measures: float) -> dict[str, Any]:
    return {**measures, "benchmarks": {"test": {"rouge_l": rouge, "rouge_l_deviation": deviation}}}


RESULTS = {
    "models": {
        "teacher": entry(17.75, None, loss=3.9812, kl=0.0),
        "student": entry(14.2, 0.5, loss=4.25, kl=0.8),
        "initial": entry(0.8, 0.126, loss=8.5149),
    }
}


def test_rows_are_ordered_from_initial_student_to_teacher() -> None:
    rows = table_rows(RESULTS)
    assert [row[0] for row in rows[1:]] == ["student before", "student after", "teacher"]
    assert rows[1][1:] == ["8.515", "–", "0.80 ± 0.13"]
    assert rows[2][1:] == ["4.250", "0.800", "14.20 ± 0.50"]
    assert rows[3][-1] == "17.75"
    assert len({len(row) for row in rows}) == 1


def test_footnotes_of_a_benchmark_are_below_the_table() -> None:
    results = {**RESULTS, "footnotes": {"test": ["2 of 9 prompts cut", "more"]}}
    lines = markdown_table(results).splitlines()
    assert "ROUGE-L test ⚠" in lines[0] and lines[-1] == "⚠ test: 2 of 9 prompts cut; more"


def test_every_markdown_line_has_the_same_number_of_cells() -> None:
    lines = markdown_table(RESULTS).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {5}
    assert lines[3].split("|")[1].strip() == "student after"
