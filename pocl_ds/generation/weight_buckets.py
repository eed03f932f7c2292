"""Weights on their way to another process on the same GPU, in buckets.

The sender copies some parameters after the other into one buffer of GPU memory. The receiver opens
the buffer by a CUDA IPC handle and copies them out, while the sender waits. So no weight passes
through host memory, and the sender needs the buffer and one parameter besides its own weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pocl_ds.compat import torch_private
from pocl_ds.errors import ResourceError

# How weights reach a generator in another process.
WeightTransfer = Literal["file", "cuda_ipc"]
BUCKET_BYTES = 256 << 20  # a larger parameter gets its own bucket
ALIGNMENT = 16  # bytes: a parameter of any dtype may start there


@dataclass(frozen=True)
class PackedTensor:
    """A parameter in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the buffer


@dataclass(frozen=True)
class Bucket:
    """What the receiver needs to read the parameters of a bucket."""

    handle: Any  # of the buffer, see `torch_private.share_cuda_tensor`
    tensors: tuple[PackedTensor, ...]


def pack_buckets(
    weights: Iterable[tuple[str, Tensor]],
    device: torch.device,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> Generator[Bucket, None, None]:
    """Copy parameters into a buffer on `device`, bucket by bucket, in their order.

    A bucket overwrites the one before: ask for it when the receiver has copied that one. Raises
    ResourceError if other processes cannot open the buffer.
    """
    buffer = torch.empty(0, dtype=torch.uint8, device=device)
    handle: Any = None
    packed: list[PackedTensor] = []
    end = 0
    for name, weight in weights:
        data = weight.detach().contiguous().reshape(-1).view(torch.uint8)
        start = math.ceil(end / ALIGNMENT) * ALIGNMENT
        if packed and start + len(data) > len(buffer):
            yield _complete(handle, packed, device)
            packed, start = [], 0
        if handle is None or len(data) > len(buffer):
            buffer = torch.empty(max(bucket_bytes, len(data)), dtype=torch.uint8, device=device)
            handle = _share(buffer)
        end = start + len(data)
        buffer[start:end].copy_(data)
        packed.append(PackedTensor(name, weight.dtype, tuple(weight.shape), start))
    if packed:
        yield _complete(handle, packed, device)


def unpack_buckets(
    receive: Callable[[], Bucket | None], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the buckets that `receive` returns until None, as copies on `device`.

    When it asks for a bucket, those of the bucket before are copied.
    """
    handle: Any = None
    buffer: Any = None
    while (bucket := receive()) is not None:
        if handle is None or bucket.handle != handle:
            handle, buffer = bucket.handle, torch_private.open_cuda_tensor(bucket.handle, device)
        copies = [(tensor.name, _copy_out(buffer, tensor)) for tensor in bucket.tensors]
        _synchronize(device)
        yield from copies


def _complete(handle: Any, packed: list[PackedTensor], device: torch.device) -> Bucket:
    _synchronize(device)
    return Bucket(handle, tuple(packed))


def _share(buffer: Tensor) -> Any:
    try:
        return torch_private.share_cuda_tensor(buffer)
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise ResourceError(
            "the student's weights cannot be shared with the rollout process on the same GPU "
            f"({message[:200]}): set policy.weight_transfer=file"
        ) from error


def _copy_out(buffer: Tensor, tensor: PackedTensor) -> Tensor:
    num_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    data = buffer[tensor.start : tensor.start + num_bytes]
    return data.view(tensor.dtype).view(tensor.shape).clone()


def _synchronize(device: torch.device) -> None:
    """Wait until the copies in the current stream are complete: the other process has its own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
