"""The peak memory of a stretch of code: of torch's allocator on a GPU, of the process on a CPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> int:
    """Bytes in use; the peak is measured from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Return freed memory to the system, or a later contender could use it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _process_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The largest number of bytes in use since `reset_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _process_bytes("VmHWM")


def _process_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
