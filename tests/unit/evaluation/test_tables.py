"""Tables of results: order, absent values, columns that stand below one another."""

from __future__ import annotations

from typing import Any

from pocl_ds.evaluation.tables import markdown_table, results_table


def entry(rouge: float, deviation: float | None, **measures: float) -> dict[str, Any]:
    return {**measures, "benchmarks": {"test": {"rouge_l": rouge, "rouge_l_deviation": deviation}}}


RESULTS = {
    "models": {
        "teacher": entry(17.75, None, loss=3.9812, kl=0.0),
        "student": entry(14.2, 0.5, loss=4.25, kl=0.8),
        "initial": entry(0.8, 0.126, loss=8.5149),
    }
}


def test_rows_stand_in_the_order_of_the_story() -> None:
    lines = results_table(RESULTS).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "student before",
        "student after",
        "teacher",
    ]
    assert "8.515" in lines[2] and "–" in lines[2] and "0.80 ± 0.13" in lines[2]
    assert "4.250" in lines[3] and "0.800" in lines[3] and "14.20 ± 0.50" in lines[3]
    assert lines[4].rstrip().endswith("17.75")
    assert len({len(line) for line in lines}) == 1


def test_what_there_is_to_say_of_a_benchmark_stands_below_both_tables() -> None:
    said = {**RESULTS, "marks": {"test": ["2 of 9 prompts cut", "more"]}}
    for table in (results_table(said), markdown_table(said)):
        assert (
            "ROUGE-L test ⚠" in table.splitlines()[0]
            and table.splitlines()[-1] == "⚠ test: 2 of 9 prompts cut; more"
        )


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = markdown_table(RESULTS).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {5}
    assert lines[3].split("|")[1].strip() == "student after"
