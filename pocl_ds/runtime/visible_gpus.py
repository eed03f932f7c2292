"""The GPUs that a process sees, by the variables of CUDA and of ROCm.

CUDA reads CUDA_VISIBLE_DEVICES. ROCm takes the GPUs of ROCR_VISIBLE_DEVICES first, and chooses
among them by HIP_VISIBLE_DEVICES or, where that is not set, by CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import os


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs that this process sees, as its variables give them; numbers from 0 if they
    restrict nothing. count: of devices that torch sees.
    """
    for variable in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if names := [name for name in os.environ.get(variable, "").split(",") if name]:
            return names
    return [str(number) for number in range(count)]


def gpu_variables(devices: str) -> dict[str, str]:
    """The variables that let a child process see only some GPUs of this one.

    devices: names from `visible_gpus`, with commas between them. HIP_VISIBLE_DEVICES is set where
    this process has it, since ROCm prefers it, and vLLM refuses two that differ.
    """
    variables = {"CUDA_VISIBLE_DEVICES": devices}
    if os.environ.get("HIP_VISIBLE_DEVICES"):
        variables["HIP_VISIBLE_DEVICES"] = devices
    return variables
