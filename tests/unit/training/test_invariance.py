"""Before training, student and teachers that depend on the batch are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_dependence import make_batch_dependent

from pocl_ds.config import LossConfig, StudentConfig, TeacherConfig, TrainConfig
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.errors import ModelError
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.teachers.teacher import OnlineTeacher, TeacherEnsemble
from pocl_ds.training.data import TrainingData
from pocl_ds.training.invariance import check_models
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.training.student import Student
from pocl_ds.training.training_run import TrainingRun

SIZE, LENGTHS = 320, (90, 20, 64, 65, 40, 30)
LAYOUTS = pytest.mark.parametrize("packed", [False, True])


def check(
    folder: Path,
    model: Path,
    packed: bool,
    *,
    teachers: int = 0,
    micro_batch_size: int = 4,
) -> dict[str, Any]:
    """Check a tiny model as the student, and as each of some teachers."""
    draw = np.random.default_rng(0)
    sequences = [[int(token) for token in draw.integers(2, 300, length)] for length in LENGTHS]
    names = [f"s{row}" for row in range(len(LENGTHS))]
    save_split(folder, "train", names, sequences, [5] * len(LENGTHS))
    split, rows = TokenizedSplit.open(folder, "train"), np.arange(len(LENGTHS))
    vocab, attention = VocabMap(SIZE), PER_SAMPLE if packed else None
    own = Student(load_model(str(model), attention=attention), vocab, chunk_bytes=1 << 20).train()
    members = [
        OnlineTeacher(load_model(str(model), attention=attention), None, vocab)
        for _ in range(teachers)
    ]
    teacher: Any = TeacherEnsemble(members, [1.0] * teachers) if teachers else NoTeacher()
    training = TrainingRun(
        directory=folder,
        fingerprint="f",
        label="train",
        plan=single_stage_plan(rows, steps=1, batch_size=4, temperature=1.0, sft_ratio=0.0),
        student_path=str(model),
        student=StudentConfig(model=str(model)),
        teacher_paths=tuple(f"teacher-{number}" for number in range(teachers)),
        teacher=TeacherConfig(model=str(model)) if teachers else None,
        loss=LossConfig(),
        train=TrainConfig(engine="torch"),
        seed=3,
    )
    data = TrainingData(split, None, Layout(packed, 0.0), micro_batch_size)
    return check_models(training, TrainingModels(TorchEngine(own, TrainConfig()), teacher), data)


@LAYOUTS
def test_models_with_longrope(packed: bool, tiny_longrope: Path, tmp_path: Path) -> None:
    info = check(tmp_path, tiny_longrope, packed, teachers=2)
    assert list(info) == ["student", "teacher-0", "teacher-1"]
    assert all(entry["samples"] == 4 for entry in info.values())
    assert max(entry["largest_difference"] for entry in info.values()) < 1e-5


@LAYOUTS
def test_a_student_that_depends_on_its_batch(
    packed: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_batch_dependent(monkeypatch)
    with pytest.raises(
        ModelError,
        match=r"^train: the student: the cross-entropy of sample s\d \(\d+ response tokens\) is "
        r"[\d.]+ nats alone and [\d.]+ in a batch of 4, .*: set student.attn_implementation=eager, "
        r"or train.micro_batch_size=1 without train.micro_batch_tokens$",
    ):
        check(tmp_path, tiny_llama, packed)


def test_without_batches_nothing_is_compared(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_batch_dependent(monkeypatch)
    info = check(tmp_path, tiny_llama, packed=False, micro_batch_size=1)
    assert info == {"student": {"samples": 0}}


@LAYOUTS
def test_a_teacher_that_depends_on_its_batch(
    packed: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_batch_dependent(monkeypatch)
    monkeypatch.setattr("pocl_ds.training.invariance._check_student", lambda *_: {})
    with pytest.raises(ModelError, match=r"^train: the teacher teacher-0: the cross-entropy of "):
        check(tmp_path, tiny_llama, packed, teachers=1)
