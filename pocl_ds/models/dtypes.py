"""Data types: what `auto` means on this machine."""

from __future__ import annotations

import functools
import logging

import torch

log = logging.getLogger("pocl_ds")


def resolve_dtype(dtype: str, device: torch.device | None = None) -> str:
    """The name of a torch dtype for the recipe's value: `auto` is bfloat16 on GPUs, else float32.

    device: where the model runs; None is this process's device.
    """
    if dtype != "auto":
        return dtype
    if device is None:
        from pocl_ds.runtime import distributed

        device = distributed.device()
    resolved = "float32" if device.type == "cpu" else "bfloat16"
    _log_once(resolved, device.type)
    return resolved


@functools.cache
def _log_once(dtype: str, device_type: str) -> None:
    log.info("dtype auto: %s on this %s", dtype, "CPU" if device_type == "cpu" else "GPU")
