"""Ranks of test_stage_teachers: start stages with different teachers, and write which of the first
one's objects outlive it.

    launch/train.sh --ranks R --module stage_teacher_worker TEACHER TEACHER STUDENT OUT.json
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from pocl_ds.config import TrainConfig, ds_config
from pocl_ds.data.batches import Batch
from pocl_ds.engines.deepspeed_engine import DeepSpeedEngine, sharded_loading, start_deepspeed
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers.routed import RoutedModel, StageTeachers
from pocl_ds.teachers.teacher import OnlineTeacher
from pocl_ds.training.student import Student

SIZE, PROMPT = 320, 4


def batch() -> Batch:
    ids = torch.randint(2, SIZE, (1, 20), generator=torch.Generator().manual_seed(0))
    labels = ids[0, PROMPT:]
    positions = torch.arange(PROMPT - 1, ids.shape[1] - 1)
    return Batch(
        ids, torch.ones_like(ids), None, None, positions, labels, labels * 0, (0,), "train"
    )


def main(first: str, second: str, student_path: str, out: Path) -> None:
    """Train a step in each of three stages; the last two share a teacher."""
    start_deepspeed()
    ranks, train, ids = distributed.world_size(), TrainConfig(), VocabMap(SIZE)
    frozen = ds_config.resolve_teacher(
        "teacher_zero3", dtype="float32", ranks=ranks, micro_batch_size=1
    )
    config = ds_config.resolve_student("student_zero3", train=train, dtype="float32", ranks=ranks)

    def load(routed: RoutedModel) -> OnlineTeacher:
        with sharded_loading(frozen):
            model = load_model(routed.path, attention=PER_SAMPLE, dropout=0.0)
            return OnlineTeacher(model, frozen, ids)

    with sharded_loading(config):
        model = load_model(student_path, attention=PER_SAMPLE, dropout=0.0)
    student = DeepSpeedEngine(Student(model, ids, chunk_bytes=1 << 20).train(), train, config)
    teachers = StageTeachers(
        [RoutedModel("first", first), RoutedModel("second", second)], [0, 1, 1], load
    )

    def train_step() -> float:
        teacher = teachers.of_batch(batch())
        outputs = teacher.outputs(batch())
        with teacher.head() as head:
            total, *_ = student.forward(batch(), LossTerms("fkl", 1.0, 0.0), outputs, head)
        student.backward(total, normalizer=16, is_last=True)
        student.step(1e-3)
        return float(total.detach())

    teachers.start_stage(0)
    losses = [train_step()]
    teacher: Any = teachers.of_batch(batch())
    owned = [teacher, teacher.model, *teacher.model.parameters()]
    owned += [parameter.ds_tensor for parameter in teacher.model.parameters()]
    references = [weakref.ref(part) for part in owned]
    del teacher, owned
    alive = sum(reference() is not None for reference in references)
    teachers.start_stage(1)
    losses.append(train_step())
    second_teacher = teachers.of_batch(batch())
    teachers.start_stage(2)
    losses.append(train_step())
    result = {
        "alive_before": alive,
        "parts": len(references),
        "alive_after": sum(reference() is not None for reference in references),
        "shared": teachers.of_batch(batch()) is second_teacher,
        "losses": losses,
    }
    results = distributed.gather_objects(result)
    if distributed.rank() == 0:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
