"""The student's weights on their way from the training engine to the rollout generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from pocl_ds.generation.protocol import Generator
from pocl_ds.generation.weight_buckets import WeightTransfer

# For the log: how weights reach a generator in another process.
TRANSFER_NOTES: dict[WeightTransfer, str] = {
    "cuda_ipc": "by CUDA IPC handles, without a copy in host memory",
    "file": "through a file in shared memory",
}


def choose_weight_transfer(
    requested: Literal["auto", "file"], *, on_gpu: bool
) -> tuple[WeightTransfer, str]:
    """How weights reach a generator in another process, and why.

    requested: policy.weight_transfer. on_gpu: the generator shares the GPU of its rank.
    """
    if not on_gpu:
        return "file", "the generator computes on CPUs"
    if requested == "file":
        return "file", "policy.weight_transfer=file"
    return "cuda_ipc", "the generator shares the GPU of its rank"


def send_weights(generator: Generator, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Load weights into a generator, one after the other.

    Also after an error it takes all of them: the ranks gather each parameter together, and the
    others would wait for this one.
    """
    try:
        generator.load_weights(weights)
    finally:
        for _ in weights:
            pass


def copy_to_host(
    weights: Iterable[tuple[str, Tensor]], copies: dict[str, torch.Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights on, and collect a copy of each in host memory."""
    for name, weight in weights:
        copies[name] = weight.cpu()
        yield name, weight
