"""A rollout worker of a tiny student, with transformers as its generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import PolicyConfig, StudentConfig, TrainConfig
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts.rollout import RolloutWorker
from pocl_ds.training.student import Student

SIZE, ROWS = 320, np.arange(4)


class Split:
    """Four samples of ten tokens, of which four are the prompt."""

    name = "train"
    ids = np.array([f"s{row}".encode() for row in range(4)], "S4")
    prompt_tokens = np.full(4, 4, np.int64)
    total_tokens = np.full(4, 10, np.int64)
    loss_tokens = total_tokens - prompt_tokens

    def __len__(self) -> int:
        return 4

    def tokens(self, row: int) -> NDArray[np.uint32]:
        return np.random.default_rng(row).integers(2, SIZE, 10).astype(np.uint32)

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        return np.arange(int(self.total_tokens[row])) >= int(self.prompt_tokens[row])

    def prompt_source(self, row: int) -> tuple[str, int]:
        return self.name, row


def make_worker(folder: Path, *, interval: int = 1, dtype: Any = "float32") -> RolloutWorker:
    model: Any = load_model(str(folder), attention=PER_SAMPLE, dtype=dtype)
    engine = TorchEngine(Student(model, VocabMap(SIZE), chunk_bytes=1 << 20).train(), TrainConfig())
    policy = PolicyConfig(
        name="gkd", rollout_backend="transformers", sync_weights_every=interval, max_new_tokens=12
    )
    student = StudentConfig(model=str(folder), dtype=dtype)
    return RolloutWorker(
        policy, student, str(folder), engine, Split(), VocabMap(SIZE), seed=3, max_length=20
    )


def update_student(rollout: RolloutWorker, size: float = 0.05) -> None:
    """What an optimizer step would do to the student."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rollout.module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=source))


def generate(rollout: RolloutWorker, step: int) -> list[list[int]]:
    return [
        text.tolist()
        for text in rollout.generate(ROWS, SamplerPosition(step, 0, 0, step)).sequences
    ]
