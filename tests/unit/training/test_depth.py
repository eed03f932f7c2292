"""Number of frames between a training step and the formula of a divergence."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import LossConfig, TrainConfig
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.losses import closed_forms, divergences
from pocl_ds.losses.top_k import TopKCodec
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

PACKAGE = str(Path(divergences.__file__).parents[1])
SIZE, K = 320, 4
MAX_FRAMES = 5


class TopKTeacher:
    """A teacher that encodes top-k records from the logits of an online teacher."""

    def __init__(self, teacher: OnlineTeacher) -> None:
        self.teacher, self.codec = teacher, TopKCodec(K, SIZE, (1.0,))

    def find_damage(self, split: str, rows: Any) -> None:
        pass

    def outputs(self, batch: Any) -> torch.Tensor:
        with self.teacher.head() as head:
            return self.codec.encode(head.logits(self.teacher.outputs(batch), SIZE))

    @contextlib.contextmanager
    def head(self) -> Iterator[TopKCodec]:
        yield self.codec


def frames_to_formula(
    trainer: Trainer, formulas: dict[str, Callable[..., Any]], name: str, patch: pytest.MonkeyPatch
) -> list[str]:
    """The package's frames between `train_step` and a formula, without these two."""
    frames: list[str] = []
    formula = formulas[name]

    def spy(*arguments: Any, **options: Any) -> Any:
        if not frames:
            stack = [f for f in traceback.extract_stack()[:-1] if f.filename.startswith(PACKAGE)]
            frames.extend(f"{Path(f.filename).name}:{f.name}" for f in stack)
        return formula(*arguments, **options)

    patch.setitem(formulas, name, spy)
    trainer.train_step(trainer.schedule.sampler.position(0))
    return frames[frames.index("trainer.py:train_step") + 1 :]


def build_trainer(folder: Path, name: str, engine: TorchEngine, teacher: Any) -> Trainer:
    plan = single_stage_plan(np.arange(4), steps=1, batch_size=2, temperature=1.0, sft_ratio=0.3)
    train = TrainConfig(batch_size=2, micro_batch_size=2)
    ids = np.array([f"t{i}".encode() for i in range(4)])
    texts = [np.arange(2, 8, dtype=np.uint32)] * 4
    split: Any = GeneratedBatch(np.arange(4), ids, np.full(4, 2), texts)
    return Trainer(
        TrainingModels(engine, teacher),
        TrainingData(split, None, Layout(False, 0.0), 2),
        TrainingSchedule(plan, Sampler(plan, 0), train),
        LossConfig(name=name),
        ResponseSource(OffPolicy()),
        Checkpoints(folder / "checkpoints", train.checkpoint, fingerprint="f"),
        TrainingMonitor(folder, "train", train),
    )


@pytest.mark.parametrize(
    ("name", "formulas", "cached"),
    [
        ("fkl", closed_forms.CLOSED_FORMS, False),
        ("akl", divergences.DIVERGENCES, False),
        ("fkl", divergences.DIVERGENCES, True),
    ],
    ids=["closed form", "autograd", "cached top-k records"],
)
def test_at_most_five_frames_from_a_step_to_the_formula(
    name: str,
    formulas: dict[str, Callable[..., Any]],
    cached: bool,
    tmp_path: Path,
    tiny_llama: Path,
    tiny_llama_untied: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vocab = VocabMap(SIZE)
    student = Student(load_model(str(tiny_llama)), vocab, chunk_bytes=1 << 20)
    engine = TorchEngine(student.train(), TrainConfig(batch_size=2, micro_batch_size=2))
    online = OnlineTeacher(load_model(str(tiny_llama_untied)), None, vocab)
    teacher: Any = online
    if cached:
        teacher = TopKTeacher(online)
    frames = frames_to_formula(
        build_trainer(tmp_path, name, engine, teacher), formulas, name, monkeypatch
    )
    assert len(frames) <= MAX_FRAMES, frames
    assert frames[0] == "student.py:forward"
