"""One rank that saves DeepSpeed's checkpoints, loads them, inserts code and loads them again.

launch/train.sh --ranks 1 --module untrusted_worker FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocl_ds.config import TrainConfig
from pocl_ds.config.ds_config import resolve_student
from pocl_ds.engines.deepspeed_engine import DeepSpeedEngine, start_deepspeed
from pocl_ds.errors import ArtifactError


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def assert_refused(function: Callable[..., None], *arguments: Path) -> None:
    try:
        function(*arguments)
    except ArtifactError as error:
        assert "mkdir" in str(error) and "none of its code was run" in str(error)
    else:
        raise AssertionError(f"{function.__name__} accepted the checkpoint")


def check(name: str, dtype: str, folder: Path) -> None:
    train = TrainConfig(batch_size=2, micro_batch_size=2)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    engine = DeepSpeedEngine(
        module, train, resolve_student(name, train=train, dtype=dtype, ranks=1)
    )
    engine.backward(
        engine.forward(torch.ones(2, 8, dtype=getattr(torch, dtype))).float().sum(),
        normalizer=2,
        is_last=True,
    )
    engine.step(1e-3)
    saved, converted, sprung = folder / name / dtype, folder / name / "converted", folder / "sprung"
    saved.mkdir(parents=True)
    files = engine.snapshot(saved, copy=False)()
    engine.load(saved)
    if reshards := name == "student_zero3" and dtype == "float32":
        converted.mkdir()
        engine.reshard(saved, converted)
        engine.load(converted, resharded=True)
    file = next(path for path in files if "optim" in path.name)
    torch.save({**torch.load(file, weights_only=False), "more": Trap(sprung)}, file)
    assert_refused(engine.load, saved)
    if reshards:
        assert_refused(engine.reshard, saved, folder / "again")
    assert not sprung.exists()


if __name__ == "__main__":
    start_deepspeed()
    for case in (
        ("student_zero3", "float32"),
        ("student_zero3", "bfloat16"),
        ("student_zero2", "float32"),
    ):
        check(*case, Path(sys.argv[1]))
    print("read as data")
