"""What tests share that make this process a rank."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from deepspeed.utils import groups


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """DeepSpeed makes this process a rank: what starts processes later must not find it so, nor the
    next such tests its group.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if dist.is_initialized():
        dist.destroy_process_group()
        groups._WORLD_GROUP = None
