"""One rank that saves a ZeRO-3 checkpoint, converts it, and runs the same step from both.

launch/train.sh --ranks 1 --module reshard_worker FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from pocl_ds.config import TrainConfig
from pocl_ds.config.ds_config import resolve_student
from pocl_ds.engines.deepspeed_engine import DeepSpeedEngine, start_deepspeed
from pocl_ds.runtime import distributed


def step(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    values = torch.ones(2, 8, device=distributed.device(), dtype=torch.bfloat16)
    engine.backward(engine.forward(values).float().sum(), normalizer=2, is_last=True)
    engine.step(1e-3)
    return {name: weight.clone() for name, weight in engine.gathered_parameters(engine.module)}


def main(folder: Path) -> None:
    """Assert that a step from either checkpoint gives the same weights."""
    start_deepspeed()
    train = TrainConfig(batch_size=2, micro_batch_size=2)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    engine = DeepSpeedEngine(
        module, train, resolve_student("student_zero3", train=train, dtype="bfloat16", ranks=1)
    )
    step(engine)
    engine.snapshot(folder, copy=False)()
    engine.reshard(folder, folder)
    expected = step(engine)
    engine.load(folder)
    plain = step(engine)
    engine.load(folder, resharded=True)
    converted = step(engine)
    assert all(
        plain[name].equal(expected[name]) and converted[name].equal(expected[name])
        for name in expected
    )
    print("the same step on", distributed.device().type)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
