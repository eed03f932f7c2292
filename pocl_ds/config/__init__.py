"""The recipe: its sections, the checks across sections, and reading it from YAML with overrides."""

from pocl_ds.config.base import (
    RUNTIME_ONLY,
    Int,
    NonNegative,
    Positive,
    RecordFields,
    RecordFormat,
    Section,
    semantic_fields,
)
from pocl_ds.config.baseline import BaselineConfig
from pocl_ds.config.curriculum import CurriculumConfig, RescoringConfig, SampleWeightsConfig
from pocl_ds.config.data import DataConfig, DocumentationConfig, TasksConfig
from pocl_ds.config.endpoint import TeacherEndpointConfig
from pocl_ds.config.evaluation import (
    BenchmarkConfig,
    EvaluateConfig,
    HarnessConfig,
    JudgeConfig,
)
from pocl_ds.config.export import ExportConfig
from pocl_ds.config.generation import GenerationConfig
from pocl_ds.config.launch import LaunchConfig
from pocl_ds.config.loss import LossConfig, TokenRuleConfig
from pocl_ds.config.models import (
    EnsembleTeacherConfig,
    LoraConfig,
    ModelConfig,
    ModelSource,
    PruneConfig,
    StudentConfig,
    TeacherConfig,
)
from pocl_ds.config.policy import PolicyConfig, SharesConfig
from pocl_ds.config.prompt import PromptConfig
from pocl_ds.config.ranking import RankingConfig
from pocl_ds.config.recipe import Recipe
from pocl_ds.config.report import ReportConfig
from pocl_ds.config.scoring import ScoreConfig
from pocl_ds.config.teacher_cache import TeacherCacheConfig
from pocl_ds.config.training import CheckpointConfig, TrackingConfig, TrainConfig

__all__ = [
    "RUNTIME_ONLY",
    "BaselineConfig",
    "BenchmarkConfig",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "DocumentationConfig",
    "EnsembleTeacherConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerationConfig",
    "HarnessConfig",
    "Int",
    "JudgeConfig",
    "LaunchConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "ModelSource",
    "NonNegative",
    "PolicyConfig",
    "Positive",
    "PromptConfig",
    "PruneConfig",
    "RankingConfig",
    "Recipe",
    "RecordFields",
    "RecordFormat",
    "ReportConfig",
    "RescoringConfig",
    "SampleWeightsConfig",
    "ScoreConfig",
    "Section",
    "SharesConfig",
    "StudentConfig",
    "TasksConfig",
    "TeacherCacheConfig",
    "TeacherConfig",
    "TeacherEndpointConfig",
    "TokenRuleConfig",
    "TrackingConfig",
    "TrainConfig",
    "semantic_fields",
]
