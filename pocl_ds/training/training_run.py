"""The settings of one training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from pocl_ds.config import (
    LossConfig,
    ModelSource,
    PolicyConfig,
    RescoringConfig,
    SampleWeightsConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from pocl_ds.config.registry import CROSS_TOKENIZER_LOSSES
from pocl_ds.curriculum.plan import Plan
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.teachers.cache_plan import CacheReference


@dataclass(frozen=True)
class TrainingRun:
    """One training: plan, student, teacher, loss, and the directory that it writes."""

    directory: Path
    fingerprint: str
    label: str  # in logs and manifests
    plan: Plan
    student_path: str
    student: StudentConfig
    teacher_paths: tuple[str, ...]  # of `teacher.sources`
    teacher: TeacherConfig | None
    loss: LossConfig
    train: TrainConfig
    seed: int
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    # When the student ranks the samples again, and their weights then; None: never, as for the
    # baseline and healing.
    rescoring: RescoringConfig | None = None
    sample_weights: SampleWeightsConfig | None = None
    max_length: int = 512  # tokens of a prompt and the response that the student generates
    # Ids that end the student's turns, besides those that its tokenizer and settings name.
    end_of_turn_ids: tuple[int, ...] = ()
    float32_weights: bool = False  # write the master weights instead of those of the forward pass
    # The tokenized split with the teacher's responses, if the policy uses them.
    teacher_responses: Path | None = None
    teacher_cache: CacheReference | None = None  # None for an online teacher

    @property
    def online_teachers(self) -> list[ModelSource]:
        """The sources of the teachers that are loaded, with their resolved paths. With teachers by
        stage or by domain, each once.
        """
        if self.teacher is None or self.teacher_cache:
            return []
        teachers = [
            source.model_copy(update={"model": path})
            for source, path in zip(self.teacher.sources, self.teacher_paths, strict=True)
        ]
        if self.teacher.routes_field:
            first = {path: self.teacher_paths.index(path) for path in self.teacher_paths}
            return [teachers[place] for place in first.values()]
        return teachers

    @property
    def teachers_of_a_token(self) -> int:
        """How many teachers the loss of a token uses."""
        return 1 + len(self.teacher.ensemble) if self.teacher and not self.teacher_cache else 1

    @property
    def cross_tokenizer(self) -> bool:
        """Whether the loss compares models with different tokenizers."""
        return self.loss.name in CROSS_TOKENIZER_LOSSES

    @property
    def teacher_has_own_prompts(self) -> bool:
        """Whether a teacher with the student's vocabulary reads its own prompts."""
        return bool(self.teacher and self.teacher.template == "own") and not self.cross_tokenizer

    def with_resolved_dtypes(self) -> TrainingRun:
        """The same training, with `auto` dtypes resolved for this machine."""
        # The plain engine has no float32 master weights: its student trains in float32.
        plain = self.train.engine == "torch"
        dtype = "float32" if plain else resolve_dtype(self.student.dtype)
        student = self.student.model_copy(update={"dtype": dtype})
        if self.teacher is None:
            return replace(self, student=student)
        teacher = self.teacher.model_copy(update={"dtype": resolve_dtype(self.teacher.dtype)})
        return replace(self, student=student, teacher=teacher)
