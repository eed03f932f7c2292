"""Ask the teacher at each step, or keep its hidden states? `teacher.mode: auto` measures, and takes
what costs less time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocl_ds.errors import ResourceError
from pocl_ds.workflow.files import explain_disk_errors, read_json, write_json

log = logging.getLogger("pocl_ds")

PROBE_BYTES = 64 << 20
SPARE = 0.05  # of the free disk is left alone


@dataclass(frozen=True)
class Use:
    """What the trainings of a run ask of the teacher."""

    visits: float  # how often a sample is seen, on average
    temperatures: tuple[float, ...] = (1.0,)  # temperatures of all stages, and 1


@dataclass(frozen=True)
class Costs:
    """What the choice follows from; rates are those of all ranks together."""

    tokens: int  # of one look at every sample
    visits: float
    forward_tokens_per_second: float
    bytes: int  # of all hidden states
    free_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float

    @property
    def live_seconds(self) -> float:
        """The teacher's forward at each visit."""
        return self.visits * self.tokens / self.forward_tokens_per_second

    @property
    def hidden_seconds(self) -> float:
        """One forward, one write, and a read from disk at each visit."""
        once = (
            self.tokens / self.forward_tokens_per_second + self.bytes / self.write_bytes_per_second
        )
        return once + self.visits * self.bytes / self.read_bytes_per_second


def decide(costs: Costs) -> tuple[str, str]:
    """`live` or `hidden`, and why."""
    needed = (
        f"{costs.bytes / 1e9:.2f} GB of hidden states, {costs.free_bytes / 1e9:.2f} GB may be used"
    )
    if costs.bytes > costs.free_bytes:
        return "online", f"{needed}: they do not fit"
    live, hidden = costs.live_seconds, costs.hidden_seconds
    why = (
        f"each sample is seen {costs.visits:.1f} times; at {costs.forward_tokens_per_second:.0f} "
        f"tokens/s forward, "
        f"{costs.write_bytes_per_second / 1e6:.0f} MB/s written and "
        f"{costs.read_bytes_per_second / 1e6:.0f} MB/s read, asking "
        f"the live teacher takes {live:.0f} s and keeping its hidden states {hidden:.0f} s "
        f"({needed})"
    )
    return ("cached_hidden_states" if hidden < live else "online"), why


def choose(path: Path, costs: Callable[[], Costs]) -> dict[str, Any]:
    """The choice in a file, {"mode", "why", "costs"}: read where it was made, else measured and
    written, once for all tasks of an array. One rank calls it.
    """
    if not path.is_file():
        measured = costs()
        mode, why = decide(measured)
        own = path.with_name(
            f".{path.name}.{secrets.token_hex(8)}"
        )  # tasks on two nodes may have one process number
        write_json(own, {"mode": mode, "why": why, "costs": asdict(measured)})
        with (
            explain_disk_errors(path),
            contextlib.suppress(FileExistsError),
        ):  # another task was first: its choice holds
            os.link(own, path)
        own.unlink()
    found: dict[str, Any] = read_json(path)
    log.info("teacher.mode=auto: %s, since %s", found["mode"], found["why"])
    return found


def free_bytes(folder: Path, limit_gb: float | None) -> int:
    """What may be written there: the disk's free space but a little, or teacher_cache.max_disk_gb where that is
    less.
    """
    state = os.statvfs(folder)
    free = int(state.f_bavail * state.f_frsize * (1 - SPARE))
    return free if limit_gb is None else min(free, int(limit_gb * 1e9))


def disk_rates(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second written, and read again with a cold page cache."""
    size = max(1 << 20, min(size, PROBE_BYTES))
    path, block = folder / f".probe.{secrets.token_hex(8)}", os.urandom(1 << 20)
    try:
        with explain_disk_errors(path), path.open("wb", buffering=0) as stream:
            start = time.perf_counter()
            for _ in range(size >> 20):
                stream.write(block)
            os.fsync(stream.fileno())
            written = time.perf_counter() - start
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb", buffering=0) as stream:
            start = time.perf_counter()
            while stream.read(1 << 20):
                pass
            read = time.perf_counter() - start
    except ResourceError:
        return 1.0, 1.0  # no room even for the probe: what is kept would not fit either
    finally:
        path.unlink(missing_ok=True)
    whole = (size >> 20) << 20
    return whole / written, whole / read
