"""Private names of torch that this package uses, seen in torch 2.13.

tests/unit/compat/test_torch_private.py fails when one of them changes.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def set_process_group_timeout(timeout: timedelta) -> None:
    """Set the timeout of every process group: those that exist, and the default of later ones.

    `init_process_group(timeout=...)` covers only the group that it creates, existing groups have no
    public setter, and DeepSpeed creates further groups with torch's default of 10 minutes.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)
