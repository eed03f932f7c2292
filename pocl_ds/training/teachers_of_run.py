"""The teachers of a training: their vocabulary, their memory, and loading them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import EnsembleTeacherConfig, ModelSource, TeacherConfig, ds_config
from pocl_ds.data.split_sources import read_split_domains
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import sharded_loading
from pocl_ds.errors import ArtifactError
from pocl_ds.models.load import embedding_rows, empty_model
from pocl_ds.models.quantization import bytes_per_weight
from pocl_ds.models.recipe_model import ModelLoader, read_model_config, zero_sizes
from pocl_ds.models.vocab import VocabMap, align_teacher_vocabularies, separate_vocabularies
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache import TeacherCache
from pocl_ds.teachers.routed import DomainTeachers, RoutedModel, StageTeachers
from pocl_ds.teachers.teacher import CachedTeacher, OnlineTeacher, TeacherEnsemble
from pocl_ds.training.compilation import compile_layers
from pocl_ds.training.models import AnyTeacher, NoTeacher
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class TeacherLoader:
    """Loads the online teachers of a training."""

    training: TrainingRun
    vocab: VocabMap
    load: ModelLoader

    def __call__(self, path: str) -> OnlineTeacher:
        """Load the teacher in a folder, with the settings of the first one. All ranks call it
        together.
        """
        training, config = self.training, self.training.teacher
        assert config is not None
        source = config.sources[training.teacher_paths.index(path)]
        source_config = config.model_copy(
            update={"revision": source.revision, "trust_remote_code": source.trust_remote_code}
        )
        settings = teacher_ds_config(training, path, source)
        with sharded_loading(settings):
            model = self.load(path, source_config, None)
            compile_layers(model, training.train)
            return OnlineTeacher(model, settings, self.vocab, split=training.loss.fused)


def align_vocabularies(training: TrainingRun) -> VocabMap:
    """Which ids take part in the softmax of the student and of all teachers. Logs the alignment."""
    if training.teacher is None:
        config = read_model_config(training.student_path, training.student)
        return VocabMap(embedding_rows(config))
    align = separate_vocabularies if training.cross_tokenizer else align_teacher_vocabularies
    teachers = dict(zip(training.teacher_paths, training.teacher.sources, strict=True))
    alignment = align(
        [(source, path) for path, source in teachers.items()],
        training.student,
        training.student_path,
    )
    log.info("%s", alignment.report)
    if training.teacher_cache:
        log.info("the teacher's outputs are cached; only its head is loaded")
    else:
        placement = (
            "sharded over the ranks" if teacher_is_sharded(training) else "complete on every rank"
        )
        log.info("the teacher is %s", placement)
    return VocabMap.from_alignment(alignment)


def teacher_ds_config(
    training: TrainingRun, path: str, source: ModelSource
) -> dict[str, Any] | None:
    """The DeepSpeed configuration of an online teacher; None if it is not sharded."""
    if training.teacher is None or training.teacher_cache or training.train.engine != "deepspeed":
        return None
    return ds_config.resolve_teacher(
        training.teacher.ds_config,
        dtype=training.teacher.dtype,
        ranks=distributed.world_size(),
        micro_batch_size=training.train.micro_batch_size,
        sizes=zero_sizes(path, source),
    )


def teacher_is_sharded(training: TrainingRun) -> bool:
    """Whether ZeRO-3 shards the online teachers."""
    if training.teacher is None:
        return False
    return bool(teacher_ds_config(training, training.teacher_paths[0], training.teacher))


def quantized_teachers(training: TrainingRun) -> list[tuple[ModelSource, float | None]]:
    """The teachers that are loaded, each with the bytes per weight of its linear layers, None if
    they are not quantized.
    """
    if training.teacher is None:
        return []
    quantization = training.teacher.quantization
    return [
        (source, bytes_per_weight(read_model_config(source.model, source), quantization))
        for source in training.online_teachers
    ]


def build_teacher(
    run: RunDirectory,
    training: TrainingRun,
    cached_splits: list[TokenizedSplit],
    vocab: VocabMap,
    load: ModelLoader,
) -> AnyTeacher:
    """The cached teacher, the online teacher, several, or none. Teachers of stages are loaded
    later.

    cached_splits: those whose outputs a cached teacher holds.
    """
    config = training.teacher
    if config is None:
        return NoTeacher()
    if training.teacher_cache:
        cache = TeacherCache(run.teacher_cache, cached_splits, fingerprint=training.teacher_cache)
        return CachedTeacher(cache)
    load_teacher = TeacherLoader(training, vocab, load)
    if config.by_stage:
        return _stage_teachers(training, load_teacher)
    if config.by_domain:
        models = _distinct_models(training)
        teachers = tuple(load_teacher(model.path) for model in models)
        log.info("teachers by domain: %s", ", ".join(model.path for model in models))
        return DomainTeachers(models, teachers)
    teachers = tuple(load_teacher(path) for path in training.teacher_paths)
    if len(teachers) == 1:
        return teachers[0]
    sources: tuple[TeacherConfig | EnsembleTeacherConfig, ...] = (config, *config.ensemble)
    ensemble = TeacherEnsemble(teachers, [source.weight for source in sources])
    members = zip(ensemble.weights, training.teacher_paths, strict=True)
    log.info("teacher ensemble: %s", ", ".join(f"{weight:.2f} {path}" for weight, path in members))
    return ensemble


def _stage_teachers(training: TrainingRun, load_teacher: TeacherLoader) -> StageTeachers:
    config, models = training.teacher, _distinct_models(training)
    assert config is not None
    path_of_field = dict(zip(config.named_sources, training.teacher_paths, strict=True))
    places = {model.path: place for place, model in enumerate(models)}
    stages = range(1, len(training.plan.stages) + 1)
    model_of_stage = [
        places[path_of_field.get(f"teacher.by_stage.{stage}", training.teacher_paths[0])]
        for stage in stages
    ]
    listed = ", ".join(
        f"{stage} {models[place].path}" for stage, place in zip(stages, model_of_stage)
    )
    log.info("teachers by stage: %s", listed)
    return StageTeachers(models, model_of_stage, load_teacher)


def _distinct_models(training: TrainingRun) -> tuple[RoutedModel, ...]:
    """The different teachers, the first one first. Those of one folder are one."""
    assert training.teacher is not None
    labels: dict[str, str] = {}
    for path, source in zip(training.teacher_paths, training.teacher.sources, strict=True):
        labels.setdefault(path, source.label)
    return tuple(RoutedModel(label, path) for path, label in labels.items())


def teacher_of_rows(
    run: RunDirectory, training: TrainingRun
) -> Mapping[str, NDArray[np.int64]] | None:
    """The teacher of each training and validation sample, as its place among those of
    `DomainTeachers`: split -> [samples]. None unless domains have their own.

    Raises ArtifactError if the data has no domains.
    """
    config = training.teacher
    if config is None or not config.by_domain:
        return None
    places = {model.path: place for place, model in enumerate(_distinct_models(training))}
    path_of_field = dict(zip(config.named_sources, training.teacher_paths, strict=True))
    rows = {}
    for split in ("train", "validation"):
        domains = read_split_domains(run.data, split)
        if domains is None:
            raise ArtifactError(
                f"{run.data} has no domains, which teacher.by_domain needs: run `pocl preprocess`"
            )
        place_of_domain = [
            places[path_of_field.get(f"teacher.by_domain.{name}", training.teacher_paths[0])]
            for name in domains.names
        ]
        rows[split] = np.array(place_of_domain, np.int64)[domains.numbers]
    return rows


def loaded_models(teacher: AnyTeacher) -> list[Any]:
    """The models of online teachers that are loaded."""
    teachers: Sequence[Any] = (
        teacher.teachers if isinstance(teacher, (TeacherEnsemble, DomainTeachers)) else [teacher]
    )
    return [member.model for member in teachers if isinstance(member, OnlineTeacher)]


def models_for_layout(training: TrainingRun, teacher: AnyTeacher) -> list[Any]:
    """The models of online teachers, empty ones for those of later stages: the layout of
    micro-batches must suit all of them, from whichever stage the training resumes.
    """
    if not isinstance(teacher, StageTeachers) or training.teacher is None:
        return loaded_models(teacher)
    return [
        empty_model(
            read_model_config(source.model, source),
            trust_remote_code=source.trust_remote_code,
            attention=training.teacher.attn_implementation,
        )
        for source in training.online_teachers
    ]
