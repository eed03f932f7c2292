"""Peak speed of GPUs in bfloat16 matrix products, without sparsity, as their makers state it."""

from __future__ import annotations

import re

# Words in the name that the driver gives a card -> FLOP per second. The first match counts.
PEAK_FLOPS: dict[str, float] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI355X": 2516e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI300A": 980e12,
    "MI250X": 191.5e12,  # of one of its two dies, which is one device
}


def peak_flops(device_name: str) -> float | None:
    """The peak of a card by the name that the driver gives it, as in `NVIDIA H100 80GB HBM3`.

    None for a card that is not in the table, and for a part of a card (MIG).
    """
    if "MIG" in device_name:
        return None
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return peak
    return None
