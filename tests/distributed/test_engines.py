"""What engines set up around DeepSpeed: how long ranks wait, and what a conversion of shards leaves."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from pocl_ds.config import TrainConfig
from pocl_ds.distill.engine import DeepSpeedEngine, FrozenEngine, TorchEngine, start_deepspeed
from pocl_ds.distributed import PATIENCE
from pocl_ds.ds_config import resolve_student, resolve_teacher

pytestmark = pytest.mark.usefixtures("alone")


def patience() -> set[timedelta]:
    """How long groups wait: each that there is, and a new one."""
    dist.new_group([0])
    return {group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map}


@pytest.mark.parametrize("hang_seconds", [1800.0, 9e9])
@pytest.mark.parametrize("name", ["torch", "student_zero3", "student_zero2"])
def test_ranks_wait_longer_than_the_watchdog(name: str, hang_seconds: float) -> None:
    """In every group: DeepSpeed makes its own after the teacher, before the student is there."""
    start_deepspeed()
    frozen = resolve_teacher("teacher_zero3", dtype="float32", ranks=2, micro_batch_size=1)
    assert frozen is not None
    FrozenEngine(nn.Linear(4, 4), {**frozen, "train_batch_size": 1})
    assert min(patience()) >= timedelta(seconds=PATIENCE)
    train = TrainConfig(batch_size=1, micro_batch_size=1, hang_seconds=hang_seconds)
    engine: Any = (
        TorchEngine(nn.Linear(4, 4), train) if name == "torch"
        else DeepSpeedEngine(nn.Linear(4, 4), train, resolve_student(name, train=train, dtype="float32", ranks=1))
    )  # fmt: skip
    assert min(patience()) > timedelta(seconds=hang_seconds + 60)
    engine.backward(engine(torch.ones(1, 4)).sum(), normaliser=1, last=True)
    engine.step(1e-3)
    dist.barrier()


def test_converted_shards_count_their_steps_where_the_parameter_is() -> None:
    """A GPU's fused Adam reads the counter there; `meta` stands for it. Each has a counter of its own."""
    shared = torch.tensor(3.0)
    states: dict[Any, Any] = {torch.empty(2, device=where): {"step": shared} for where in ("meta", "cpu", "cpu")}
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.weight_decays = [0.1, 0.0]
    groups = [{"weight_decay": 0.1}, {"weight_decay": 0.1}]
    engine.engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups, optimizer=SimpleNamespace(state=states)))
    engine._mend_universal_load()
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(state["step"].device == parameter.device for parameter, state in states.items())
    steps = [state["step"] for state in states.values() if state["step"].device.type == "cpu"]
    assert [float(step) for step in steps] == [3.0, 3.0] and len({step.data_ptr() for step in (shared, *steps)}) == 3
