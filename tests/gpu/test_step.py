"""An optimizer step on a GPU: how often the host waits for it, and metrics that are read late."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import LossConfig, TrainConfig
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts.policies import OffPolicy
from pocl_ds.teachers.teacher import OnlineTeacher
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.student import Student
from pocl_ds.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"
    ),
]
SIZE, STEPS = 320, 6


def make_trainer(folder: Path, student: Path, teacher: Path) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(0)
    samples = [source.integers(2, SIZE, int(source.integers(7, 40))).tolist() for _ in range(12)]
    save_split(folder, "train", [f"s{i}" for i in range(12)], samples, [3] * 12)
    train = TrainConfig(batch_size=4, micro_batch_size=2, validate_max_samples=0)
    plan = single_stage_plan(
        np.arange(12), steps=STEPS, batch_size=4, temperature=1.5, sft_ratio=0.3
    )
    vocab = VocabMap(SIZE).to(torch.device("cuda"))
    module = Student(load_model(str(student), dropout=0.0), vocab, chunk_bytes=1 << 20).train()
    return Trainer(
        TrainingModels(
            TorchEngine(module, train), OnlineTeacher(load_model(str(teacher)), None, vocab)
        ),
        TrainingData(TokenizedSplit.open(folder, "train"), None, Layout(False, 0.0), 2),
        TrainingSchedule(plan, Sampler(plan, 0), train),
        LossConfig(),
        ResponseSource(OffPolicy()),
        Checkpoints(folder / "checkpoints", train.checkpoint, fingerprint=""),
        TrainingMonitor(folder, "train", train),
    )


def run_steps(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    """The records of the first steps."""
    seen = []
    for step in range(count):
        trainer.train_step(trainer.schedule.sampler.position(step))
        seen.append(trainer.record)
    seen.append(trainer.finish_step())
    return [record for record, before in zip(seen, [{}, *seen], strict=False) if record != before]


def test_a_step_makes_the_host_wait_at_most_once(
    tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    """Reading the step before is a wait for an event, which torch does not count."""
    trainer = make_trainer(tmp_path, tiny_llama, tiny_llama_untied)
    run_steps(trainer, 2)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in (2, 3):
                trainer.train_step(trainer.schedule.sampler.position(step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    trainer.batches.close()
    assert len(waits) <= 2, [(warning.filename, warning.lineno) for warning in caught]


def test_late_metrics_equal_early_ones(
    tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    losses = []
    for late in (False, True):
        trainer = make_trainer(tmp_path / str(late), tiny_llama, tiny_llama_untied)
        assert trainer.reads_late
        trainer.reads_late = late
        steps = run_steps(trainer, STEPS)
        trainer.batches.close()
        losses.append([(record["step"], record["loss"], record["grad_norm"]) for record in steps])
        parts = ("data", "teacher", "student", "optimizer", "wait")
        assert all(
            record["seconds"]
            == pytest.approx(sum(record[f"{part}_seconds"] for part in parts), rel=1e-3)
            for record in steps
        )
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
