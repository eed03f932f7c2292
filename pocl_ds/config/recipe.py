"""The recipe: one validated, frozen object that defines a run.

Each section has its own file in this folder. Fields marked `runtime_only` change how a run is
executed (ranks, shards, logging), not what it computes: changing them never invalidates finished
steps. All other fields enter the fingerprints of the workflow steps. This module does not import
torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pocl_ds.config.base import RUNTIME_ONLY, FileName, NonNegative, Section
from pocl_ds.config.baseline import BaselineConfig
from pocl_ds.config.consistency import check_consistency
from pocl_ds.config.curriculum import CurriculumConfig
from pocl_ds.config.data import DataConfig
from pocl_ds.config.evaluation import EvaluateConfig
from pocl_ds.config.export import ExportConfig
from pocl_ds.config.launch import LaunchConfig
from pocl_ds.config.loss import LossConfig
from pocl_ds.config.models import ModelSource, StudentConfig, TeacherConfig
from pocl_ds.config.policy import PolicyConfig
from pocl_ds.config.prompt import PromptConfig
from pocl_ds.config.ranking import RankingConfig
from pocl_ds.config.registry import CROSS_TOKENIZER_LOSSES, METRICS, UNSCORED_STRATEGIES
from pocl_ds.config.report import ReportConfig
from pocl_ds.config.scoring import ScoreConfig
from pocl_ds.config.teacher_cache import TeacherCacheConfig
from pocl_ds.config.training import TrainConfig

MAX_NAME_LENGTH = 100  # names of folders and jobs are made of it


class Recipe(Section):
    """Everything that defines a run."""

    name: Annotated[FileName, Field(max_length=MAX_NAME_LENGTH)] = Field(
        description="Name of the run: at most 100 letters, digits, dots, underscores and hyphens."
    )
    plugins: tuple[str, ...] = Field(
        (),
        description="Python modules that register divergences, token rules, metrics, ranking "
        "strategies, sample weights, measures of difficulty or policies through `pocl_ds.plugins`.",
    )
    description: str = Field(
        "",
        description="One sentence about the recipe, shown by `pocl recipes`; has no effect.",
        json_schema_extra=RUNTIME_ONLY,
    )
    hardware: str = Field(
        "",
        description="The hardware that the recipe needs, shown by `pocl recipes`; has no effect.",
        json_schema_extra=RUNTIME_ONLY,
    )
    seed: NonNegative = Field(
        42, description="Seed of shuffling, dropout, random rankings and rollouts."
    )
    data: DataConfig
    prompt: PromptConfig = PromptConfig()
    teacher: TeacherConfig | None = Field(
        None, description="The model that is distilled; `null` for fine-tuning (`loss.name: sft`)."
    )
    student: StudentConfig
    teacher_cache: TeacherCacheConfig = TeacherCacheConfig()
    score: ScoreConfig = ScoreConfig()
    ranking: RankingConfig = RankingConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    loss: LossConfig = LossConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    baseline: BaselineConfig = BaselineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _check_sections(self) -> Recipe:
        if self.ranking.strategy in METRICS and self.ranking.strategy not in self.score.metrics:
            raise ValueError(
                f"ranking.strategy={self.ranking.strategy} is a metric that is not computed: add "
                "it to score.metrics"
            )
        check_consistency(self)
        return self

    @property
    def scores_samples(self) -> bool:
        """Whether the student answers and scores the training samples."""
        return self.ranking.strategy not in UNSCORED_STRATEGIES and self.ranking.scores is None

    @property
    def teacher_ranks(self) -> int:
        """Number of ranks that run the teacher alone."""
        has_own = self.teacher is not None and self.teacher.placement == "own_ranks"
        return self.teacher.ranks if self.teacher and has_own else 0

    @property
    def total_ranks(self) -> int:
        """Number of processes of a training: the student's ranks and those of the teacher alone."""
        return self.launch.ranks + self.teacher_ranks

    @property
    def cross_tokenizer(self) -> bool:
        """Whether the loss compares models with different tokenizers."""
        return self.loss.name in CROSS_TOKENIZER_LOSSES

    @property
    def local_teacher(self) -> TeacherConfig | None:
        """The teacher, if its tokenizer and its configuration are read here; None without a
        teacher, and for one that only exchanges texts.
        """
        return None if self.teacher is None or self.teacher.is_text_only else self.teacher

    @property
    def local_models(self) -> tuple[ModelSource, ...]:
        """The student, and the teachers whose configurations are read here."""
        return (self.student, *(self.local_teacher.sources if self.local_teacher else ()))

    @property
    def teacher_template(self) -> Literal["student", "own"]:
        """Whose chat template writes the teacher's prompts."""
        if self.teacher is None or self.teacher.template is None:
            return "student" if self.needs_shared_vocabulary else "own"
        return self.teacher.template

    @property
    def teacher_has_own_prompts(self) -> bool:
        """Whether the data is also written as the teacher reads it."""
        own = self.needs_shared_vocabulary and self.teacher_template == "own"
        return self.teacher is not None and (self.cross_tokenizer or own)

    @property
    def needs_shared_vocabulary(self) -> bool:
        """Whether teacher and student must share a vocabulary."""
        # Healing always distils with a divergence over token ids.
        distils = self.loss.name != "sft" or self.student.heal_steps > 0
        return self.teacher is not None and distils and not self.cross_tokenizer
