"""Chunks of samples in several processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data import tokenize_workers
from pocl_ds.data.tokenize_workers import chunks_of_lines, default_num_workers, map_chunks
from pocl_ds.errors import DataError, ResourceError


def process_ids(chunk: list[int]) -> tuple[int, list[int]]:
    return os.getpid(), [2 * number for number in chunk]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_results_come_in_order(num_workers: int) -> None:
    chunks = [[number] for number in range(40)]

    def double(chunk: list[int]) -> tuple[int, list[int]]:
        time.sleep(0.01 * (chunk[0] % 3))
        return process_ids(chunk)

    pairs = list(map_chunks(double, chunks, num_workers))
    assert [chunk for chunk, _ in pairs] == chunks
    assert [result for _, (_, result) in pairs] == [[2 * number] for number in range(40)]
    processes = {process for _, (process, _) in pairs}
    assert processes == {os.getpid()} if num_workers == 1 else len(processes) > 1


def test_few_chunks_need_no_other_process() -> None:
    chunks = [[number] for number in range(tokenize_workers.SERIAL_CHUNKS)]
    assert {pid for _, (pid, _) in map_chunks(process_ids, chunks, 4)} == {os.getpid()}


def test_chunks_are_read_as_they_are_needed() -> None:
    """The memory does not grow with the number of chunks."""
    read = 0

    def chunks() -> object:
        nonlocal read
        for number in range(100):
            read += 1
            yield [number]

    for taken, _ in enumerate(map_chunks(process_ids, chunks(), 2), 1):  # type: ignore[arg-type]
        assert read - taken <= 2 * tokenize_workers.CHUNKS_PER_WORKER


def fail_at(number: int, action: Callable[[], object]) -> Callable[[list[int]], int]:
    def function(chunk: list[int]) -> int:
        if chunk[0] == number:
            action()
        return os.getpid()

    return function


def test_an_error_arrives_unchanged() -> None:
    def refuse() -> None:
        raise DataError("line 9 is empty: fix it", reason="empty")

    with pytest.raises(DataError, match="^line 9 is empty: fix it$") as error:
        list(map_chunks(fail_at(9, refuse), [[n] for n in range(20)], 2))
    assert error.value.reason == "empty"
    assert tokenize_workers.PARALLELISM_VARIABLE in os.environ  # as the tests set it


def test_a_killed_process_is_one_sentence() -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ResourceError, match="data.num_workers=2 processes died"):
        list(map_chunks(fail_at(9, die), [[n] for n in range(20)], 2))


def test_no_process_remains_if_the_results_are_not_all_taken() -> None:
    results = map_chunks(process_ids, [[n] for n in range(50)], 2)
    processes = {next(results)[1][0] for _ in range(12)} - {os.getpid()}
    results.close()  # type: ignore[attr-defined]
    assert processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@given(st.lists(st.text(max_size=30), max_size=50))
def test_chunks_are_bounded_by_number_and_length(lines: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_workers, "CHUNK_SAMPLES", 5)
        patch.setattr(tokenize_workers, "CHUNK_CHARACTERS", 40)
        chunks = list(chunks_of_lines(lines))
    assert [line for chunk in chunks for line in chunk] == lines
    for chunk in chunks:
        assert 0 < len(chunk) <= 5 and sum(map(len, chunk[:-1])) < 40


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cores_of_a_control_group(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tokenize_workers._cgroup_cores(tmp_path) == cores


def test_default_is_at_most_sixteen_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(tokenize_workers, "_cgroup_cores", lambda: None)
    assert default_num_workers() == 16
    monkeypatch.setattr(tokenize_workers, "_cgroup_cores", lambda: 3)
    assert default_num_workers() == 3
