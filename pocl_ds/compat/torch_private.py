"""Private names of torch that this package uses, seen in torch 2.13.

tests/unit/compat/test_torch_private.py fails when one of them changes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


def set_process_group_timeout(timeout: timedelta) -> None:
    """Set the timeout of every process group: those that exist, and the default of later ones.

    `init_process_group(timeout=...)` covers only the group that it creates, existing groups have no
    public setter, and DeepSpeed creates further groups with torch's default of 10 minutes.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def fake_tensors() -> FakeTensorMode:
    """A context in which tensors have shapes and dtypes, but neither memory nor values.

    The meta device is public, but operators that need real devices (attention kernels, `.to`) fail
    there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_id(storage: torch.UntypedStorage) -> int:
    """The identity of a tensor's memory: views share it. `data_ptr` is 0 for all fake tensors."""
    return storage._cdata


def set_compile_disabled(disabled: bool) -> bool:
    """Turn `torch.compile` off or on in this process, also for functions that are already
    decorated, and return the previous setting.

    The environment variable TORCHDYNAMO_DISABLE is public, but read only at import.
    """
    import torch._dynamo

    previous: bool = torch._dynamo.config.disable
    torch._dynamo.config.disable = disabled
    return previous


def raise_recompile_limit(limit: int) -> None:
    """Let `torch.compile` keep at least so many variants of a function before it stops compiling
    it.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
