"""Weights that pass to another process in buckets. CPU memory stands in for the GPU's, and a table
for CUDA IPC handles.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocl_ds.compat import torch_private
from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ResourceError
from pocl_ds.generation import subprocess_generator
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.subprocess_generator import SubprocessGenerator, serve
from pocl_ds.generation.transformers_backend import TransformersGenerator
from pocl_ds.generation.weight_buckets import ALIGNMENT, pack_buckets, unpack_buckets
from pocl_ds.models.load import load_model, load_tokenizer
from pocl_ds.rollouts.weight_transfer import choose_weight_transfer, send_weights

CPU = torch.device("cpu")
WEIGHTS = {
    "embedding": torch.arange(40, dtype=torch.float32).reshape(10, 4),  # 160 bytes
    "odd": torch.arange(5, dtype=torch.uint8),
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(3, 2),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "transposed": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "large": torch.arange(100, dtype=torch.float32),  # 400 bytes
    "empty": torch.empty(0, 3),
    "last": torch.tensor([7], dtype=torch.int64),
}


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The buffers that were shared; a handle is a place in this list."""
    shared: list[Tensor] = []

    def share(tensor: Tensor) -> int:
        shared.append(tensor)
        return len(shared) - 1

    monkeypatch.setattr(torch_private, "share_cuda_tensor", share)
    monkeypatch.setattr(torch_private, "open_cuda_tensor", lambda handle, device: shared[handle])
    return shared


@pytest.mark.parametrize(
    ("bucket_bytes", "sizes", "counts"),
    [
        (160, [160, 400], [1, 4, 2, 1]),
        (1000, [1000], [8]),
        (1, [160, 400], [1, 4, 2, 1]),  # the first parameter decides the size
    ],
)
def test_parameters_arrive_in_order_and_equal(
    bucket_bytes: int, sizes: list[int], counts: list[int], buffers: list[Tensor]
) -> None:
    """Of every dtype and shape, also one that is larger than a bucket."""
    buckets = pack_buckets(WEIGHTS.items(), CPU, bucket_bytes=bucket_bytes)
    counted: list[int] = []

    def receive() -> Any:
        bucket = next(buckets, None)
        if bucket is not None:
            counted.append(len(bucket.tensors))
            assert all(tensor.start % ALIGNMENT == 0 for tensor in bucket.tensors)
        return bucket

    arrived = dict(unpack_buckets(receive, CPU))
    assert list(arrived) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert arrived[name].dtype == weight.dtype and arrived[name].shape == weight.shape
        assert torch.equal(arrived[name], weight)
    assert [len(buffer) for buffer in buffers] == sizes and counted == counts


def test_only_a_bucket_and_one_parameter_are_held(buffers: list[Tensor]) -> None:
    """The next parameter is gathered while a bucket is full, and no further one."""
    requested: list[str] = []

    def gather() -> Iterator[tuple[str, Tensor]]:
        for number in range(12):
            requested.append(str(number))
            yield str(number), torch.full((8,), number, dtype=torch.float32)  # 32 bytes

    buckets = pack_buckets(gather(), CPU, bucket_bytes=96)
    for number in range(4):
        bucket = next(buckets)
        assert len(bucket.tensors) == 3 and len(requested) == min(12, 3 * number + 4)
    assert next(buckets, None) is None and len(buffers) == 1


def test_memory_that_cannot_be_shared_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: Tensor) -> Any:
        raise RuntimeError("CUDA error:\n  invalid argument")

    monkeypatch.setattr(torch_private, "share_cuda_tensor", fail)
    with pytest.raises(
        ResourceError,
        match=r"cannot be shared with the rollout process on the same GPU \(CUDA error: invalid "
        r"argument\): set policy.weight_transfer=file$",
    ):
        next(pack_buckets(WEIGHTS.items(), CPU))


@pytest.mark.parametrize(
    ("requested", "on_gpu", "expected"),
    [
        ("auto", True, ("cuda_ipc", "the generator shares the GPU of its rank")),
        ("file", True, ("file", "policy.weight_transfer=file")),
        ("auto", False, ("file", "the generator computes on CPUs")),
        ("file", False, ("file", "the generator computes on CPUs")),
    ],
)
def test_the_choice_of_a_transfer(requested: Any, on_gpu: bool, expected: tuple[str, str]) -> None:
    assert choose_weight_transfer(requested, on_gpu=on_gpu) == expected


class ConnectedGenerator(SubprocessGenerator):
    """Its other end is a thread of this process."""

    device = CPU
    weight_transfer = "cuda_ipc"

    def __init__(self, connection: Connection) -> None:
        self.connection, self.processed_tokens = connection, 0


@pytest.fixture
def connected(
    tiny_llama: Path, buffers: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ConnectedGenerator]:
    """A generator whose other end opened a tiny LLaMA."""

    def open_model(*_: Any) -> TransformersGenerator:
        path = str(tiny_llama)
        config = GenerationConfig(backend="transformers")
        return TransformersGenerator(path, config, load_tokenizer(path), max_length=64)

    monkeypatch.setattr(subprocess_generator, "_open", open_model)
    monkeypatch.setattr(
        subprocess_generator,
        "unpack_buckets",
        lambda receive, device: unpack_buckets(receive, CPU),
    )
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    own, other = Pipe()
    thread = threading.Thread(target=serve, args=(other,), daemon=True)
    thread.start()
    generator = ConnectedGenerator(own)
    generator._call("open")
    yield generator
    own.close()
    thread.join(30)
    assert not thread.is_alive()


def new_weights(folder: Path) -> dict[str, Tensor]:
    """Weights for which the greedy response is another one."""
    source = torch.Generator().manual_seed(0)
    parameters = load_model(str(folder)).named_parameters()
    return {
        name: value.detach() + 0.2 * torch.randn(value.shape, generator=source)
        for name, value in parameters
    }


def greedy(generator: Any) -> list[list[int]]:
    responses: list[list[int]] = generator.generate_ids(
        [[5, 6, 7], [8, 9]], SamplingParams(0.0, 1.0, 12, seed=0)
    )
    return responses


def test_a_generator_loads_the_buckets_that_it_asks_for(
    connected: ConnectedGenerator, tiny_llama: Path, buffers: list[Tensor]
) -> None:
    """Twice, and with the same result as without a transfer."""
    path, weights = str(tiny_llama), new_weights(tiny_llama)
    reference = TransformersGenerator(
        path, GenerationConfig(backend="transformers"), load_tokenizer(path), max_length=64
    )
    before = greedy(connected)
    assert before == greedy(reference)
    for _ in range(2):
        send_weights(connected, iter(weights.items()))
    reference.load_weights(weights.items())
    assert greedy(connected) == greedy(reference) != before
    assert len(buffers) == 2


def test_after_an_error_all_parameters_are_still_gathered(
    connected: ConnectedGenerator, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks gather them too, and would wait. The generator continues to answer."""
    weights, requested = new_weights(tiny_llama), []

    def gather() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            requested.append(name)
            yield name, weight

    def fail(self: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
        next(iter(weights))
        raise ResourceError("no memory for new weights")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersGenerator, "load_weights", fail)
        with pytest.raises(ResourceError, match="no memory for new weights"):
            send_weights(connected, gather())
    assert requested == list(weights)
    assert greedy(connected)
