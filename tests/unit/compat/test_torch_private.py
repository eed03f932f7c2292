"""The private names of torch that pocl_ds.compat.torch_private uses."""

from __future__ import annotations

import datetime
import inspect
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.multiprocessing import reductions

from pocl_ds.compat import torch_private

TIMEOUT = datetime.timedelta(hours=5)


@pytest.fixture
def process_group(tmp_path: os.PathLike[str]) -> Iterator[None]:
    """A gloo group of one rank."""
    defaults = distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout = defaults


def test_existing_and_later_groups_get_the_timeout(process_group: None) -> None:
    torch_private.set_process_group_timeout(TIMEOUT)
    dist.new_group([0])
    groups = list(distributed_c10d._world.pg_map)
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    assert len(groups) == 2 and timeouts == {TIMEOUT}
    assert distributed_c10d.default_pg_nccl_timeout == TIMEOUT


def test_fake_tensors_run_operators_without_memory() -> None:
    with torch_private.fake_tensors():
        weight = torch.empty(1 << 20, 1 << 20)
        product = torch.empty(4, 1 << 20) @ weight
    assert product.shape == (4, 1 << 20)


def test_views_share_a_storage_id() -> None:
    with torch_private.fake_tensors():
        tensor, other = torch.empty(4, 4), torch.empty(4, 4)
        ids = [torch_private.storage_id(x.untyped_storage()) for x in (tensor, tensor[1:], other)]
    assert ids[0] == ids[1] != ids[2]


def test_a_decorated_function_is_not_compiled_while_disabled() -> None:
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    triple = torch.compile(lambda x: 3 * x, backend=backend)
    before = torch_private.set_compile_disabled(True)
    try:
        assert double(torch.ones(1)).item() == 2 and compilations == []
    finally:
        assert torch_private.set_compile_disabled(False) is True
    try:
        assert triple(torch.ones(1)).item() == 3 and len(compilations) == 1
    finally:
        torch_private.set_compile_disabled(before)


def test_the_limit_of_recompilations_is_raised_and_never_lowered() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        for limit in (50, 20):
            torch_private.raise_recompile_limit(limit)
            assert torch._dynamo.config.recompile_limit == 50


def test_a_shared_tensor_is_opened_under_the_number_of_its_gpu_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which needs the place of that number among the arguments."""
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[torch_private._HANDLE_DEVICE] == "storage_device"
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *arguments: arguments)
    for device, number in (("cuda", 0), ("cuda:2", 2)):
        opened = list(torch_private.open_cuda_tensor(tuple(names), torch.device(device)))
        assert opened.pop(torch_private._HANDLE_DEVICE) == number
        assert opened == [name for name in names if name != "storage_device"]


def test_messages_between_processes_outside_the_default_group(tmp_path: os.PathLike[str]) -> None:
    """Two ends of a connection in two threads: order is kept, and bytes arrive as they were."""
    store = dist.FileStore(f"{tmp_path}/messages", 2)

    def connect(rank: int) -> torch_private.PointToPoint:
        return torch_private.PointToPoint(store, rank, 2, TIMEOUT)

    with ThreadPoolExecutor(2) as executor:
        one, other = executor.map(connect, (0, 1))
    sent = [torch.full((3,), value, dtype=torch.bfloat16) for value in (1.5, 2.5)]
    received = [torch.empty(3, dtype=torch.bfloat16) for _ in sent]
    works = [other.receive(tensor, 0, 5) for tensor in received]
    works += [one.send(tensor, 1, 5) for tensor in sent]
    for work in works:
        work.wait()
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))


def test_this_process_has_lost_no_gpu() -> None:
    assert torch_private.is_gpu_lost_by_fork() is False
