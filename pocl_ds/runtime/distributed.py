"""Ranks: who am I, sums over all, and decisions that all take together.

Everything works without a process group too, as a world of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pocl_ds.errors import DisagreementError, PoclError, ResourceError
from pocl_ds.workflow.manifest import peak_host_bytes

# How long ranks wait for one that works alone (digests a checkpoint, converts shards, seals what a
# teacher said), in seconds. The ends of hangs are others': the watchdog, who leaves stacks, and the
# launcher and SLURM, where a rank died.
PATIENCE = 4 * 3600.0


def rank() -> int:
    """This process's number, from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """This rank's device: its own GPU, else the CPU. Raises ResourceError where a rank has no GPU
    of its own.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ResourceError(
            f"rank {rank()} has no GPU: {torch.cuda.device_count()} are visible on this node, "
            f"local rank is {local}; "
            "start at most one rank a GPU (launch.ranks)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def device_name() -> str:
    """This rank's device in words: where a GPU was expected, CPU is a finding."""
    where = device()
    return "CPU" if where.type == "cpu" else torch.cuda.get_device_name(where)


def memory() -> dict[str, float]:
    """Most memory that this process took so far in GiB, on its GPU where it has one; there also how
    busy that is, in percent.
    """
    where = device()
    if where.type == "cpu":
        return {"memory_gib": peak_host_bytes() / 2**30}
    found = {"memory_gib": torch.cuda.max_memory_allocated(where) / 2**30}
    with contextlib.suppress(
        Exception
    ):  # needs nvidia-ml-py, whose own errors say that a GPU's part does not tell
        found["gpu_busy"] = float(torch.cuda.utilization(where))
    return found


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; the same bits on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def be_patient(hang_timeout_seconds: float = 0.0) -> timedelta:
    """Let every group of ranks, also one that is made later, wait longer than the watchdog does.
    Returns how long.

    NCCL's own end of a wait is an abort without stacks; it comes after 10 minutes in DeepSpeed's
    group, and in each that it makes from it after torch's default, whatever the first one was
    given.
    """
    patience = timedelta(seconds=PATIENCE + hang_timeout_seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = patience
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(patience, group)
    return patience


def settle() -> None:
    """Wait until all ranks have done what they began, on their GPUs too: before a clock is read."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    barrier()


def agree(facts: Mapping[str, Any]) -> None:
    """Make sure that all ranks are about to do the same. Raises DisagreementError on every rank,
    naming who differs and how.

    Costs one reduction of two numbers: ranks that go different ways would else be seen as a hang,
    after train.hang_timeout_seconds.
    """
    if not dist.is_initialized():
        return
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    number = float(int.from_bytes(digest[:6], "big"))  # 48 bits: exact as a float64
    pair = torch.tensor([number, -number], dtype=torch.float64, device=device())
    dist.all_reduce(pair, op=dist.ReduceOp.MAX)
    if pair[0] == -pair[1]:
        return
    everyone = gather_objects(dict(facts))
    common = Counter(map(repr, everyone)).most_common(1)[0][0]
    usual = next(found for found in everyone if repr(found) == common)
    odd = next(number for number, found in enumerate(everyone) if repr(found) != common)
    names = [
        name for name in {**usual, **everyone[odd]} if usual.get(name) != everyone[odd].get(name)
    ]
    raise DisagreementError(
        f"rank {odd} is about to do something else than the others: "
        + "; ".join(
            f"{name} {everyone[odd].get(name)!r} against {usual.get(name)!r}" for name in names
        )
        + ": start all ranks from the same code, recipe and run directory"
    )


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def peak_memory() -> dict[str, int]:
    """The most memory that any rank ever held, bytes: on its host, and on its GPU where there is
    one. All ranks call it.
    """
    mine = {"peak_host_bytes": peak_host_bytes()}
    if device().type == "cuda":
        mine["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    everyone = gather_objects(mine)
    return {name: max(one[name] for one in everyone) for name in mine}


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Run a block on every rank; where one fails with a user's fault, all leave with that same
    sentence.

    Without it one rank would stop and the others hang in their next collective call.
    """
    fault: PoclError | None = None
    try:
        yield
    except PoclError as error:
        fault = error
    faults = gather_objects(None if fault is None else (type(fault).__name__, str(fault)))
    if fault is not None:
        raise fault
    for other, found in enumerate(faults):
        if found is not None:
            raise ResourceError(f"rank {other} could not {what}: {found[1]}")


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self.mark = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        return seconds
