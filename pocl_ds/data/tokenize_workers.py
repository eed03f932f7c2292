"""Work on samples in several processes: chunks in, results out in the same order.

The processes are forked, as those of `datasets.map` and of torch's data loader: they start in a few
milliseconds and share tokenizers, also those with custom code, without a copy. Each computes on its
own core, so the tokenizers library must not start its own threads there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from pocl_ds.errors import ResourceError
from pocl_ds.runtime.parent_death import die_with_parent

MAX_WORKERS = 16
CHUNK_SAMPLES, CHUNK_CHARACTERS = 512, 1 << 20
SERIAL_CHUNKS = 4  # so many chunks are faster without other processes
CHUNKS_PER_WORKER = 2  # in progress or finished and not yet taken, which bounds the memory
PARALLELISM_VARIABLE = "TOKENIZERS_PARALLELISM"

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
_function: Callable[[Any], Any]  # of a worker process


def default_num_workers() -> int:
    """The cores that this process may use, at most MAX_WORKERS."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, _cgroup_cores() or cores, MAX_WORKERS))


def _cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The cores that the control group grants, rounded up; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, length = (root / "cpu.max").read_text().split()
        return None if limit == "max" else -(-int(limit) // int(length))
    with contextlib.suppress(OSError, ValueError):  # the first version of control groups
        quota, period = (
            int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
        return None if quota <= 0 else -(-quota // period)
    return None


def chunks_of_lines(lines: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive lists of at most CHUNK_SAMPLES lines and about CHUNK_CHARACTERS characters."""
    chunk: list[str] = []
    characters = 0
    for line in lines:
        chunk.append(line)
        characters += len(line)
        if len(chunk) >= CHUNK_SAMPLES or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def map_chunks(
    function: Callable[[Chunk], Result], chunks: Iterable[Chunk], num_workers: int
) -> Iterator[tuple[Chunk, Result]]:
    """Each chunk with `function(chunk)`, in order, computed by `num_workers` processes.

    The first SERIAL_CHUNKS are computed in this process, and all of them with num_workers=1. A
    PoclError that `function` raises arrives unchanged. Raises ResourceError if a process dies.
    """
    iterator = iter(chunks)
    for number, chunk in enumerate(iterator, 1):
        yield chunk, function(chunk)
        if num_workers > 1 and number == SERIAL_CHUNKS:
            yield from _map_in_processes(function, iterator, num_workers)


def _map_in_processes(
    function: Callable[[Chunk], Result], chunks: Iterator[Chunk], num_workers: int
) -> Iterator[tuple[Chunk, Result]]:
    pending: deque[tuple[Chunk, Future[Result]]] = deque()
    with _process_pool(function, num_workers) as pool:
        try:
            for chunk in chunks:
                pending.append((chunk, pool.submit(_call, chunk)))
                if len(pending) >= CHUNKS_PER_WORKER * num_workers:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        except BrokenProcessPool:
            raise ResourceError(
                f"one of data.num_workers={num_workers} processes died, which is mostly for lack "
                "of memory: lower it, or give more memory"
            ) from None


@contextlib.contextmanager
def _process_pool(
    function: Callable[[Any], Any], num_workers: int
) -> Iterator[ProcessPoolExecutor]:
    # The library's own threads do not survive a fork. It reads the variable at each call.
    previous = os.environ.get(PARALLELISM_VARIABLE)
    os.environ[PARALLELISM_VARIABLE] = "false"
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(function, os.getpid()),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if previous is None:
            del os.environ[PARALLELISM_VARIABLE]
        else:
            os.environ[PARALLELISM_VARIABLE] = previous


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    """Prepare a worker process: the parent handles signals, and no worker outlives it."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)


def _call(chunk: Any) -> Any:
    return _function(chunk)
