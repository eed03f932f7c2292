"""The private names of torch that pocl_ds.compat.torch_private uses."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

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
