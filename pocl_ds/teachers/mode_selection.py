"""`teacher.mode: auto` measures the cost of running the teacher in every step and of caching its
hidden states, and selects the faster mode.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ResourceError
from pocl_ds.runtime import distributed
from pocl_ds.runtime.formatting import format_size
from pocl_ds.teachers.cache_shard import CacheShard
from pocl_ds.teachers.state_sources import HiddenStateSource
from pocl_ds.workflow.files import explain_disk_errors, read_json, write_json

log = logging.getLogger("pocl_ds")

PROBE_BYTES = 64 << 20
RESERVED_SHARE = 0.05  # fraction of the free disk space that stays unused


@dataclass(frozen=True)
class TeacherUsage:
    """How the trainings of a run use the teacher's outputs."""

    visits_per_sample: float  # mean number of times that training sees a sample
    temperatures: tuple[float, ...] = (1.0,)  # those of all stages, and 1
    # With teachers by stage: training rows of each stage, None for all samples; and whether a
    # baseline visits all samples with the first teacher.
    stage_rows: Sequence[NDArray[np.int64] | None] = ()
    has_baseline: bool = False


@dataclass(frozen=True)
class ModeCosts:
    """What the selection depends on. Rates are those of all ranks together."""

    tokens: int  # of all samples, once
    visits_per_sample: float
    forward_tokens_per_second: float
    cache_bytes: int  # of all hidden states
    usable_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float

    @property
    def online_seconds(self) -> float:
        """A forward pass at each visit."""
        return self.visits_per_sample * self.tokens / self.forward_tokens_per_second

    @property
    def cached_seconds(self) -> float:
        """One forward pass, one write, and a read from disk at each visit."""
        forward_seconds = self.tokens / self.forward_tokens_per_second
        write_seconds = self.cache_bytes / self.write_bytes_per_second
        read_seconds = self.cache_bytes / self.read_bytes_per_second
        return forward_seconds + write_seconds + self.visits_per_sample * read_seconds


def select_mode(costs: ModeCosts) -> tuple[str, str]:
    """The faster `teacher.mode`, "online" or "cached_hidden_states", and the reason."""
    sizes = (
        f"{format_size(costs.cache_bytes)} of hidden states, "
        f"{format_size(costs.usable_bytes)} of usable disk space"
    )
    if costs.cache_bytes > costs.usable_bytes:
        return "online", f"{sizes}: they do not fit"
    mode = "cached_hidden_states" if costs.cached_seconds < costs.online_seconds else "online"
    reason = (
        f"an online teacher takes {costs.online_seconds:.0f} s and cached hidden states "
        f"{costs.cached_seconds:.0f} s: {costs.visits_per_sample:.1f} visits per sample, "
        f"{costs.forward_tokens_per_second:.0f} tokens/s forward, "
        f"{costs.write_bytes_per_second / 1e6:.0f} MB/s written, "
        f"{costs.read_bytes_per_second / 1e6:.0f} MB/s read ({sizes})"
    )
    return mode, reason


def measure_and_select_mode(
    source: HiddenStateSource,
    splits: Sequence[TokenizedSplit],
    shards: Sequence[CacheShard],
    usage: TeacherUsage,
    path: Path,
    max_disk_gb: float | None,
) -> dict[str, Any]:
    """Select online or cached hidden states by measurements on this machine, and record the
    selection in `path`. The result is the same on all ranks, which call it together.

    source: the teacher as it runs online. shards: of the cache.
    """
    # Time a forward pass over one micro-batch per rank; the first one warms up.
    split = splits[0]
    lengths = np.asarray(split.total_tokens, np.int64)
    rank_batches = source.assign(lengths)
    own_rows = rank_batches[distributed.rank()][0]
    seconds = 0.0
    for _ in range(2):
        distributed.synchronize_ranks()
        start = time.perf_counter()
        for _ in source.states(split, own_rows):
            pass
        distributed.synchronize_ranks()
        seconds = time.perf_counter() - start
    tokens = sum(int(lengths[micro_batches[0]].sum()) for micro_batches in rank_batches)

    def measure_costs() -> ModeCosts:
        cache_bytes = sum(shard.bytes for shard in shards)
        write_rate, read_rate = measure_disk_rates(path.parent, cache_bytes)
        return ModeCosts(
            tokens=sum(int(split.total_tokens.sum()) for split in splits),
            visits_per_sample=usage.visits_per_sample,
            forward_tokens_per_second=tokens / seconds,
            cache_bytes=cache_bytes,
            usable_bytes=usable_bytes(path.parent, max_disk_gb),
            write_bytes_per_second=write_rate,
            read_bytes_per_second=read_rate,
        )

    # Rank 0 measures the disk and decides.
    selection = None
    with distributed.raise_on_all_ranks("select the teacher's mode"):
        if distributed.rank() == 0:
            selection = load_or_select_mode(path, measure_costs)
    result: dict[str, Any] = distributed.broadcast_object(selection)
    return result


def load_or_select_mode(path: Path, measure_costs: Callable[[], ModeCosts]) -> dict[str, Any]:
    """The selection that the file `path` holds: {"mode", "reason", "costs"}. If there is no file,
    measure, select and write it, once for all tasks of a job array. One rank calls it.
    """
    if not path.is_file():
        costs = measure_costs()
        mode, reason = select_mode(costs)
        # A random name, as tasks on two nodes may have the same process id.
        temporary_path = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        write_json(temporary_path, {"mode": mode, "reason": reason, "costs": asdict(costs)})
        # If another task wrote its selection first, that one is used.
        with explain_disk_errors(path), contextlib.suppress(FileExistsError):
            os.link(temporary_path, path)
        temporary_path.unlink()
    selection: dict[str, Any] = read_json(path)
    log.info("teacher.mode=auto selects %s: %s", selection["mode"], selection["reason"])
    return selection


def usable_bytes(folder: Path, max_disk_gb: float | None) -> int:
    """Bytes that may be written to a folder: most of the disk's free space, but at most
    `max_disk_gb` (teacher_cache.max_disk_gb).
    """
    state = os.statvfs(folder)
    free = int(state.f_bavail * state.f_frsize * (1 - RESERVED_SHARE))
    return free if max_disk_gb is None else min(free, int(max_disk_gb * 1e9))


def measure_disk_rates(folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second of a write, and of a read with a cold page cache.

    size: bytes to measure with, at least 1 MiB and at most PROBE_BYTES. Returns (1, 1) if the disk
    is too full for the measurement, where the cache would not fit either.
    """
    blocks = max(1 << 20, min(size, PROBE_BYTES)) >> 20
    path, block = folder / f".probe.{secrets.token_hex(8)}", os.urandom(1 << 20)
    try:
        with explain_disk_errors(path), path.open("wb", buffering=0) as stream:
            start = time.perf_counter()
            for _ in range(blocks):
                stream.write(block)
            os.fsync(stream.fileno())
            write_seconds = time.perf_counter() - start
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb", buffering=0) as stream:
            start = time.perf_counter()
            while stream.read(1 << 20):
                pass
            read_seconds = time.perf_counter() - start
    except ResourceError:
        return 1.0, 1.0
    finally:
        path.unlink(missing_ok=True)
    return (blocks << 20) / write_seconds, (blocks << 20) / read_seconds
