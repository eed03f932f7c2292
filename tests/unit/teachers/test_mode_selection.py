"""Live or hidden: what costs less, by what was measured, and once for all tasks of an array."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pocl_ds.teachers.mode_selection import Costs, choose, decide, disk_rates, free_bytes

COSTS = Costs(
    tokens=1_000_000,
    visits=20,
    forward_tokens_per_second=1e4,
    bytes=10**9,
    free_bytes=10**10,
    write_bytes_per_second=1e9,
    read_bytes_per_second=1e9,
)


@pytest.mark.parametrize(
    ("costs", "mode"),
    [
        (COSTS, "cached_hidden_states"),  # 2,000 s of forwards against 100 + 1 + 20
        (replace(COSTS, visits=1), "online"),  # seen once: writing buys nothing
        (replace(COSTS, read_bytes_per_second=1e7), "online"),  # 2,000 s of reads
        (replace(COSTS, free_bytes=10**9 - 1), "online"),
    ],
)
def test_the_cheaper_one_is_taken_and_why_is_said(costs: Costs, mode: str) -> None:
    found, why = decide(costs)
    assert found == mode
    assert "1.00 GB" in why and ("do not fit" in why or f"{costs.live_seconds:.0f} s" in why)


def test_the_first_choice_holds(tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    first = choose(path, lambda: COSTS)

    def never() -> Costs:
        raise AssertionError("measured twice")

    assert (
        choose(path, never) == first
        and first["mode"] == "cached_hidden_states"
        and first["costs"]["visits"] == 20
    )
    assert [file.name for file in tmp_path.iterdir()] == ["choice.json"]


def test_of_two_that_measure_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "choice.json"

    def slow() -> Costs:  # another task chooses meanwhile
        choose(path, lambda: replace(COSTS, visits=1))
        return COSTS

    assert choose(path, slow)["mode"] == "online"


def test_tasks_on_two_nodes_may_have_one_process_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "choice.json", os.link

    def late(source: Path, target: Path) -> None:  # the other node's task is through before
        monkeypatch.setattr(os, "link", link)
        choose(path, lambda: replace(COSTS, visits=1))
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert choose(path, lambda: COSTS)["mode"] == "online" and [
        file.name for file in tmp_path.iterdir()
    ] == ["choice.json"]


def test_the_disk_is_looked_at(tmp_path: Path) -> None:
    written, read = disk_rates(tmp_path, 3 << 20)
    assert written > 1e5 and read > 1e5 and list(tmp_path.iterdir()) == []
    assert free_bytes(tmp_path, 0.001) == 1_000_000 < free_bytes(tmp_path, None)
