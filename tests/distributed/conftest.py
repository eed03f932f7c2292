"""A fixture for tests that make this process a rank."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from deepspeed.utils import groups


@pytest.fixture(scope="module")
def single_rank() -> Iterator[None]:
    """Restore the environment and destroy the process group after tests in which DeepSpeed makes
    this process a rank: later tests must not inherit them.
    """
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    if dist.is_initialized():
        dist.destroy_process_group()
        groups._WORLD_GROUP = None
