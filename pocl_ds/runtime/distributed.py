"""Ranks: this process's rank and device, collectives, and errors that all ranks raise together.

Everything works without a process group too, as a world of one rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pocl_ds.compat import torch_private
from pocl_ds.errors import DisagreementError, PoclError, ResourceError
from pocl_ds.runtime.process_exit import JOB_RANK
from pocl_ds.runtime.visible_gpus import visible_gpus
from pocl_ds.workflow.manifest import peak_host_bytes

# Seconds that ranks wait in a collective while one of them works alone (checksums of a checkpoint,
# conversion of its shards). Hangs are ended earlier by the watchdog, which writes stack traces, and
# dead ranks by the launcher and by SLURM.
PROCESS_GROUP_TIMEOUT = 4 * 3600.0


def rank() -> int:
    """Rank of this process, from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def job_rank() -> int:
    """Rank of this process among all that the launcher started, also if the teacher has its own
    ranks.
    """
    return int(os.environ.get(JOB_RANK) or rank())


def world_size() -> int:
    """Number of ranks, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int | None:
    """Number of ranks on this node, from the launcher's environment; None if it does not say."""
    value = os.environ.get("LOCAL_WORLD_SIZE")
    return int(value) if value else None


def device_type() -> str:
    """ "cuda" if this machine has a GPU and DS_ACCELERATOR does not exclude it, else "cpu"."""
    use_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return "cuda" if use_gpu else "cpu"


def on_gpu() -> bool:
    """Whether the ranks compute on GPUs."""
    return device_type() == "cuda"


def device() -> torch.device:
    """This rank's device: one GPU per rank, or the CPU. Raises ResourceError if there are more
    ranks than GPUs.
    """
    if device_type() == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ResourceError(
            f"rank {rank()} has no GPU: {torch.cuda.device_count()} are visible on this node, and "
            f"its local rank is {local_rank}; start at most one rank per GPU (launch.ranks)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def visible_devices(count: int = 1) -> str:
    """This rank's GPU and those that follow it, `count` in all, as `gpu_variables` gives them
    to a child process. Raises ResourceError if so many are not visible.
    """
    first = device().index or 0
    names = visible_gpus(torch.cuda.device_count())
    if first + count > len(names):
        raise ResourceError(
            f"rank {rank()} needs {count} GPUs, from its own on, and sees {len(names)}: let the "
            "ranks of a node see all of its GPUs, or lower tensor_parallel_size"
        )
    return ",".join(names[first : first + count])


def device_name() -> str:
    """Name of this rank's device, for logs: `CPU` or the GPU's model."""
    own_device = device()
    return "CPU" if own_device.type == "cpu" else torch.cuda.get_device_name(own_device)


def memory_metrics() -> dict[str, float]:
    """`memory_gib`: peak memory of this process in GiB, on its GPU if it has one. `gpu_busy`:
    utilization of that GPU in percent, if the driver reports it.
    """
    own_device = device()
    if own_device.type == "cpu":
        return {"memory_gib": peak_host_bytes() / 2**30}
    metrics = {"memory_gib": torch.cuda.max_memory_allocated(own_device) / 2**30}
    # torch raises different errors without nvidia-ml-py and on a MIG slice.
    with contextlib.suppress(Exception):
        metrics["gpu_busy"] = float(torch.cuda.utilization(own_device))
    return metrics


def peak_memory() -> dict[str, int]:
    """Peak memory of any rank in bytes, on the host and on the GPU. A collective call."""
    own_peak = {"peak_host_bytes": peak_host_bytes()}
    if device().type == "cuda":
        own_peak["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    peaks = gather_objects(own_peak)
    return {name: max(peak[name] for peak in peaks) for name in own_peak}


def set_process_group_timeout(hang_timeout_seconds: float = 0.0) -> timedelta:
    """Let all process groups, also those that are created later, wait longer than the watchdog.

    Returns the timeout. Without it, NCCL aborts after 10 minutes and leaves no stack traces;
    DeepSpeed's own groups do not inherit the timeout of the first one.
    """
    timeout = timedelta(seconds=PROCESS_GROUP_TIMEOUT + hang_timeout_seconds)
    torch_private.set_process_group_timeout(timeout)
    return timeout


def synchronize_ranks() -> None:
    """Wait until all ranks and their GPUs are idle: before a time is measured."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    barrier()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place, with the same bits on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_vectors(values: torch.Tensor) -> torch.Tensor:
    """Every rank's vector [n] of the same length and device, in order of rank: [ranks, n]. One
    collective, and the host does not wait for it on a GPU.
    """
    if not dist.is_initialized():
        return values[None]
    gathered = values.new_empty(dist.get_world_size(), len(values))
    dist.all_gather(list(gathered), values)
    return gathered


def digest_number(values: Mapping[str, Any]) -> float:
    """A hash of values as a number that float64 holds exactly."""
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).digest()
    return float(int.from_bytes(digest[:6], "big"))  # 48 bits


def assert_ranks_agree(values: Mapping[str, Any]) -> None:
    """Check that all ranks have the same values, for example the batch that they train on next.

    Costs one reduction of two numbers. Ranks that did different things would otherwise look like a
    hang. Raises DisagreementError on every rank, with a rank that differs and its values.
    """
    if not dist.is_initialized():
        return
    # Compare a hash: its maximum equals its minimum only if all ranks have the same.
    number = digest_number(values)
    maxima = torch.tensor([number, -number], dtype=torch.float64, device=device())
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    if maxima[0] != -maxima[1]:
        raise_disagreement(values)


def raise_disagreement(values: Mapping[str, Any]) -> NoReturn:
    """Raise DisagreementError with a rank whose values differ. All ranks call it, after they have
    seen different hashes.
    """
    # Find a rank that differs from the majority, and the values in which it does.
    values_of_ranks = gather_objects(dict(values))
    majority = Counter(map(repr, values_of_ranks)).most_common(1)[0][0]
    majority_values = next(
        candidate for candidate in values_of_ranks if repr(candidate) == majority
    )
    odd_rank, odd_values = next(
        (rank, candidate)
        for rank, candidate in enumerate(values_of_ranks)
        if repr(candidate) != majority
    )
    differences = "; ".join(
        f"{name} {odd_values.get(name)!r} instead of {majority_values.get(name)!r}"
        for name in {**majority_values, **odd_values}
        if majority_values.get(name) != odd_values.get(name)
    )
    raise DisagreementError(
        f"rank {odd_rank} differs from the other ranks ({differences}): start all "
        "ranks from the same code, recipe and run directory"
    )


@contextlib.contextmanager
def raise_on_all_ranks(action: str) -> Iterator[None]:
    """Run a block on every rank; if a PoclError ends it on one rank, all ranks raise.

    Without this, the other ranks would hang in their next collective. action: what the block does,
    in the infinitive, for the message of the other ranks. Raises ResourceError on them.
    """
    error: PoclError | None = None
    try:
        yield
    except PoclError as raised:
        error = raised
    messages = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for failed_rank, message in enumerate(messages):
        if message is not None:
            raise ResourceError(f"rank {failed_rank} could not {action}: {message}")


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call, or since the object was created."""
        now = time.monotonic()
        seconds, self._start = now - self._start, now
        return seconds
