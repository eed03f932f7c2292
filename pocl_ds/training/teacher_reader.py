"""What a batch needs besides the student's tokens: those of another tokenizer, the teacher's own
prompts, or its cached outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocl_ds.data.preprocess import TEACHER_DIRECTORY
from pocl_ds.data.retokenize import TeacherRetokenizer
from pocl_ds.data.teacher_prompts import TeacherPrompts
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.models.heads import supports_packing
from pocl_ds.models.load import load_tokenizer, max_positions
from pocl_ds.models.vocab import VocabMap
from pocl_ds.teachers.routed import DomainTeachers, StageTeachers
from pocl_ds.teachers.teacher import CachedTeacher
from pocl_ds.training.data import TeacherReader
from pocl_ds.training.models import AnyTeacher
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def build_teacher_reader(
    run: RunDirectory,
    training: TrainingRun,
    teacher: AnyTeacher,
    models: Sequence[Any],
    vocab: VocabMap,
) -> TeacherReader | None:
    """Adds to a batch what the teacher reads; None if that is the batch itself. models: of online
    teachers.
    """
    if training.cross_tokenizer:
        return _retokenizer(run, training, models[0])
    if training.teacher_cache:
        assert isinstance(teacher, (CachedTeacher, StageTeachers, DomainTeachers))
        return teacher.read
    if training.teacher_has_own_prompts and models:
        packed = supports_packing(models[0])
        return TeacherPrompts(_teacher_splits(run), vocab.teacher_inputs, packed=packed)
    return None


def _retokenizer(
    run: RunDirectory, training: TrainingRun, teacher_model: Any
) -> TeacherRetokenizer:
    """Adds the teacher's tokens to batches, for a teacher with another tokenizer."""
    assert training.teacher is not None
    manifest = read_manifest(run.data)
    if manifest is None:
        raise ArtifactError(f"{run.data} holds no finished data: run `pocl preprocess` first")
    info = manifest.info
    tokenizer = load_tokenizer(
        training.student_path, trust_remote_code=training.student.trust_remote_code
    )
    teacher_tokenizer = load_tokenizer(
        training.teacher_paths[0],
        trust_remote_code=training.teacher.trust_remote_code,
        revision=training.teacher.revision,
    )
    return TeacherRetokenizer(
        tokenizer,
        teacher_tokenizer,
        _teacher_splits(run),
        student_end_ids=info["end_of_turn_ids"],
        teacher_end_ids=info["teacher_end_of_turn_ids"],
        max_length=max_positions(teacher_model.config),
        packed=supports_packing(teacher_model),
    )


def _teacher_splits(run: RunDirectory) -> dict[str, TokenizedSplit]:
    """The data as the teacher reads it."""
    directory = run.data / TEACHER_DIRECTORY
    return {name: TokenizedSplit.open(directory, name) for name in ("train", "validation")}
