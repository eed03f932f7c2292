"""Private names of torch that this package uses, seen in torch 2.13.

tests/unit/compat/test_torch_private.py fails when one of them changes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import distributed_c10d

_HANDLE_DEVICE = 6  # the place of the GPU's number among the arguments of `rebuild_cuda_tensor`

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed import Store, Work


def set_process_group_timeout(timeout: timedelta) -> None:
    """Set the timeout of every process group: those that exist, and the default of later ones.

    `init_process_group(timeout=...)` covers only the group that it creates, existing groups have no
    public setter, and DeepSpeed creates further groups with torch's default of 10 minutes.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def is_gpu_lost_by_fork() -> bool:
    """Whether this process was forked from one that had touched the GPU: it cannot use it."""
    return bool(torch.cuda._is_in_bad_fork())


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


def share_cuda_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A CUDA IPC handle of a tensor that another process may open once, as picklable values.

    Public is only sending a tensor through `torch.multiprocessing`, whose receiver looks for the
    GPU under the sender's number; a process that sees one GPU calls it 0. The tensor must live
    until the receiver has dropped it. Raises RuntimeError if its memory cannot be shared.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    arguments: tuple[Any, ...] = reduce_tensor(tensor)[1]
    return arguments


def open_cuda_tensor(handle: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """The tensor of another process, without a copy. device: the GPU that holds it, as this process
    numbers it.
    """
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    arguments = list(handle)
    arguments[_HANDLE_DEVICE] = 0 if device.index is None else device.index
    tensor: torch.Tensor = rebuild_cuda_tensor(*arguments)
    return tensor


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


class PointToPoint:
    """Messages between the processes of a store over gloo, outside the default process group.

    `torch.distributed.send` and `recv` need a registered group, and one with other processes than
    the default group's cannot be made by public functions.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self._group = distributed_c10d.ProcessGroupGloo(store, rank, size, timeout)

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> Work:
        """Start sending a tensor on the CPU, which must not change before the work is done."""
        work: Work = self._group.send([tensor], to, tag)
        return work

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Work:
        """Start receiving into a tensor on the CPU. Messages of one tag keep their order."""
        work: Work = self._group.recv([tensor], source, tag)
        return work
