"""A training whose student is one number, for tests of the loop around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import LossConfig, TrainConfig
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.rollouts.policies import OffPolicy
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.trainer import Trainer

STEPS = 6


class Split:
    """Sample r has the prompt r and a response of one token."""

    def __init__(self, name: str, ids: list[str]) -> None:
        self.name, self.ids = name, np.array([name.encode() for name in ids], "S")
        self.prompt_tokens, self.total_tokens = (
            np.full(len(ids), 1, np.int64),
            np.full(len(ids), 2, np.int64),
        )
        self.loss_tokens = self.total_tokens - self.prompt_tokens

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, row: int) -> NDArray[np.uint32]:
        return np.array([row, 0], np.uint32)

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        return np.arange(int(self.total_tokens[row])) >= int(self.prompt_tokens[row])


class Engine:
    """The loss is the number of steps. `callbacks[step]` is called before that step."""

    def __init__(self, callbacks: dict[int, Any] | None = None) -> None:
        self.module, self.steps, self.callbacks = torch.nn.Linear(1, 1), 0, callbacks or {}
        self.validated_rows: list[int] = []  # in order

    def forward(self, batch: Any, *_: Any) -> Any:
        if not self.module.training:
            self.validated_rows += batch.rows
        loss = torch.tensor(float(self.steps) * len(batch.labels))
        return loss, torch.tensor(0.0), loss

    def backward(self, *_: Any, **__: Any) -> None:
        pass

    def step(self, lr: float) -> float:
        self.callbacks.get(self.steps, int)()
        self.steps += 1
        return 1.0

    def snapshot(self, directory: Path, *, copy: bool) -> Any:
        def write() -> list[Path]:
            (directory / "weights").write_text(str(self.steps))
            return [directory / "weights"]

        return write

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        self.steps = int((directory / "weights").read_text())


class RecordingPolicy(OffPolicy):
    """Records the validation losses."""

    def __init__(self, adaptive: bool) -> None:
        self.adaptive, self.losses = adaptive, list[float]()

    def observe_validation_loss(self, loss: float) -> None:
        self.losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


def trainer(
    folder: Path, engine: Any, policy: OffPolicy, validation: Sequence[str] = ("v",), seed: int = 0
) -> Trainer:
    splits: list[Any] = [
        Split("train", [f"t{i}" for i in range(4)]),
        Split("validation", list(validation)),
    ]
    plan = single_stage_plan(
        np.arange(4), steps=STEPS, batch_size=2, temperature=1.0, sft_ratio=0.0
    )
    train = TrainConfig.model_validate(
        {
            "batch_size": 2,
            "micro_batch_size": 2,
            "validate_every_n_steps": 2,
            "checkpoint": {"every_n_steps": 3},
            "tracking": {"tensorboard": False},
        }
    )
    return Trainer(
        TrainingModels(engine, NoTeacher()),
        TrainingData(splits[0], splits[1], Layout(True, 0.0), 2),
        TrainingSchedule(plan, Sampler(plan, seed), train),
        LossConfig(name="sft"),
        ResponseSource(policy),
        Checkpoints(folder / "checkpoints", train.checkpoint, fingerprint="f"),
        TrainingMonitor(folder, "train", train),
    )
