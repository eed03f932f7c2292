"""teacher.mode=auto: the faster mode by measurements, once for all tasks of a job array."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pocl_ds.teachers.mode_selection import (
    ModeCosts,
    load_or_select_mode,
    measure_disk_rates,
    select_mode,
    usable_bytes,
)

COSTS = ModeCosts(
    tokens=1_000_000,
    visits_per_sample=20,
    forward_tokens_per_second=1e4,
    cache_bytes=10**9,
    usable_bytes=10**10,
    write_bytes_per_second=1e9,
    read_bytes_per_second=1e9,
)


@pytest.mark.parametrize(
    ("costs", "mode"),
    [
        (COSTS, "cached_hidden_states"),  # 2,000 s of forwards against 100 + 1 + 20
        (replace(COSTS, visits_per_sample=1), "online"),  # one visit: a cache is never reused
        (replace(COSTS, read_bytes_per_second=1e7), "online"),  # 2,000 s of reads
        (replace(COSTS, usable_bytes=10**9 - 1), "online"),
    ],
)
def test_the_faster_mode_is_selected_with_a_reason(costs: ModeCosts, mode: str) -> None:
    selected, reason = select_mode(costs)
    assert selected == mode
    assert "1.0 GB" in reason and (
        "do not fit" in reason or f"{costs.online_seconds:.0f} s" in reason
    )


def test_an_existing_selection_is_reused(tmp_path: Path) -> None:
    path = tmp_path / "mode.json"
    selection = load_or_select_mode(path, lambda: COSTS)

    def fail_if_measured() -> ModeCosts:
        raise AssertionError("measured twice")

    assert (
        load_or_select_mode(path, fail_if_measured) == selection
        and selection["mode"] == "cached_hidden_states"
        and selection["costs"]["visits_per_sample"] == 20
    )
    assert [file.name for file in tmp_path.iterdir()] == ["mode.json"]


def test_two_tasks_that_measure_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "mode.json"

    def measure_slowly() -> ModeCosts:  # another task selects meanwhile
        load_or_select_mode(path, lambda: replace(COSTS, visits_per_sample=1))
        return COSTS

    assert load_or_select_mode(path, measure_slowly)["mode"] == "online"


def test_tasks_on_two_nodes_may_have_the_same_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "mode.json", os.link

    def link_late(source: Path, target: Path) -> None:  # the task of the other node is faster
        monkeypatch.setattr(os, "link", link)
        load_or_select_mode(path, lambda: replace(COSTS, visits_per_sample=1))
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    assert load_or_select_mode(path, lambda: COSTS)["mode"] == "online" and [
        file.name for file in tmp_path.iterdir()
    ] == ["mode.json"]


def test_disk_rates_and_usable_bytes(tmp_path: Path) -> None:
    write_rate, read_rate = measure_disk_rates(tmp_path, 3 << 20)
    assert write_rate > 1e5 and read_rate > 1e5 and list(tmp_path.iterdir()) == []
    assert usable_bytes(tmp_path, 0.001) == 1_000_000 < usable_bytes(tmp_path, None)
