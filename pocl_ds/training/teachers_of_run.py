"""The teachers of a training: their vocabulary, their memory, and loading them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pocl_ds.config import (
    EnsembleTeacherConfig,
    ModelSource,
    TeacherConfig,
    TrainConfig,
    ds_config,
)
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import sharded_loading
from pocl_ds.models.load import embedding_rows, empty_model
from pocl_ds.models.quantization import bytes_per_weight
from pocl_ds.models.recipe_model import ModelLoader, read_model_config, zero_sizes
from pocl_ds.models.vocab import VocabMap, align_teacher_vocabularies, separate_vocabularies
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache_plan import CacheReference, open_cache
from pocl_ds.teachers.remote import RemoteTeacher
from pocl_ds.teachers.routed import (
    DomainTeachers,
    RoutedModel,
    StageTeachers,
    distinct_models,
    models_of_rows,
    models_of_stages,
)
from pocl_ds.teachers.teacher import (
    CachedTeacher,
    OnlineTeacher,
    TeacherEnsemble,
    normalized,
)
from pocl_ds.training.compilation import prepare_layers
from pocl_ds.training.models import AnyTeacher, NoTeacher
from pocl_ds.training.remote_loading import RemoteLoader, teacher_client
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class TeacherLoader:
    """Loads the online teachers of a training. fused: see `LossConfig`."""

    config: TeacherConfig
    train: TrainConfig
    fused: bool
    vocab: VocabMap
    load: ModelLoader

    def __call__(self, model: RoutedModel) -> OnlineTeacher:
        """Load a teacher, with the settings of the first one. All ranks call it together."""
        source = self.config.named_sources[model.fields[0]]
        settings = teacher_ds_config(self.config, self.train, model.path, source)
        with sharded_loading(settings):
            loaded = self.load(model.path, self.config.of_source(source), None)
            prepare_layers(loaded, self.train)
            return OnlineTeacher(loaded, settings, self.vocab, split=self.fused)


@dataclass(frozen=True)
class CacheOpener:
    """Opens the cached teachers of a training. splits: those whose outputs they hold."""

    directory: Path
    cache: CacheReference
    splits: list[TokenizedSplit]

    def __call__(self, model: RoutedModel) -> CachedTeacher:
        """Open the cache of a teacher, and load its head. All ranks call it together."""
        return CachedTeacher(
            open_cache(
                self.directory,
                self.cache.fingerprint,
                model.fields[0],
                self.splits,
                self.cache.local_copy,
            )
        )


AnyLoader: TypeAlias = TeacherLoader | CacheOpener | RemoteLoader


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
        place = (
            "sharded over the ranks" if teacher_is_sharded(training) else "complete on every rank"
        )
        own = " of its own" if training.teacher.placement == "own_ranks" else ""
        log.info("the teacher is %s%s", place, own)
    return VocabMap.from_alignment(alignment)


def teacher_ds_config(
    config: TeacherConfig, train: TrainConfig, path: str, source: ModelSource
) -> dict[str, Any] | None:
    """The DeepSpeed configuration of an online teacher on these ranks; None if it is not
    sharded.
    """
    if train.engine != "deepspeed":
        return None
    return ds_config.resolve_teacher(
        config.ds_config,
        dtype=config.dtype,
        ranks=distributed.world_size(),
        micro_batch_size=train.micro_batch_size,
        sizes=zero_sizes(path, source),
    )


def teacher_is_sharded(training: TrainingRun) -> bool:
    """Whether ZeRO-3 shards the online teachers."""
    if training.teacher is None or training.teacher_cache:
        return False
    path = training.teacher_paths[0]
    return bool(teacher_ds_config(training.teacher, training.train, path, training.teacher))


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
    load_teacher: AnyLoader = TeacherLoader(
        config, training.train, training.loss.fused, vocab, load
    )
    if config.placement == "own_ranks":
        load_teacher = RemoteLoader(training, vocab, teacher_client())
    elif training.teacher_cache:
        load_teacher = CacheOpener(run.teacher_cache, training.teacher_cache, cached_splits)
    models = distinct_models(config, training.teacher_paths)
    if config.by_stage:
        return _stage_teachers(models, len(training.plan.stages), load_teacher)
    if config.by_domain:
        return _domain_teachers(run, models, load_teacher)
    if not config.ensemble:
        return load_teacher(models[0])
    return _ensemble(config, training.teacher_paths, load_teacher)


def _ensemble(
    config: TeacherConfig, paths: Sequence[str], load_teacher: AnyLoader
) -> TeacherEnsemble | RemoteTeacher:
    sources = zip(config.named_sources.items(), paths, strict=True)
    models = [RoutedModel(source.label, path, (name,)) for (name, source), path in sources]
    members: tuple[TeacherConfig | EnsembleTeacherConfig, ...] = (config, *config.ensemble)
    weights = normalized([source.weight for source in members])
    listed = ", ".join(f"{w:.2f} {path}" for w, path in zip(weights, paths, strict=True))
    log.info("teacher ensemble: %s", listed)
    if isinstance(load_teacher, RemoteLoader):
        return load_teacher.load_ensemble(models, weights)
    assert isinstance(load_teacher, TeacherLoader)
    return TeacherEnsemble([load_teacher(model) for model in models], weights)


def _stage_teachers(
    models: Sequence[RoutedModel], stages: int, load_teacher: AnyLoader
) -> StageTeachers:
    model_of_stage = models_of_stages(models, stages)
    listed = ", ".join(
        f"{stage} {models[place].path}" for stage, place in enumerate(model_of_stage, start=1)
    )
    log.info("teachers by stage: %s", listed)
    return StageTeachers(models, model_of_stage, load_teacher)


def _domain_teachers(
    run: RunDirectory, models: tuple[RoutedModel, ...], load_teacher: AnyLoader
) -> DomainTeachers:
    """All teachers, without cached ones that no sample has. Raises ArtifactError if the data has no
    domains.
    """
    model_of_row = models_of_rows(models, run.data)
    used = set(np.unique(np.concatenate(list(model_of_row.values()))).tolist())
    teachers = {
        number: load_teacher(model)
        for number, model in enumerate(models)
        if number in used or not isinstance(load_teacher, CacheOpener)
    }
    log.info("teachers by domain: %s", ", ".join(models[number].path for number in teachers))
    return DomainTeachers(models, teachers, model_of_row)


def loaded_models(teacher: AnyTeacher) -> list[Any]:
    """The models of online teachers that are loaded."""
    teachers: Sequence[Any] = [teacher]
    if isinstance(teacher, TeacherEnsemble):
        teachers = teacher.teachers
    elif isinstance(teacher, DomainTeachers):
        teachers = list(teacher.teachers.values())
    return [member.model for member in teachers if isinstance(member, OnlineTeacher)]


def models_for_layout(training: TrainingRun, teacher: AnyTeacher) -> list[Any]:
    """The models of online teachers, empty ones for those that this rank does not load, or not
    yet: the layout of micro-batches must suit all of them, from whichever stage the training
    resumes.
    """
    if training.teacher is None:
        return []
    is_remote = training.teacher.placement == "own_ranks"
    if not isinstance(teacher, StageTeachers) and not is_remote:
        return loaded_models(teacher)
    return [
        empty_model(
            read_model_config(source.model, source),
            trust_remote_code=source.trust_remote_code,
            attention=training.teacher.attn_implementation,
        )
        for source in training.online_teachers
    ]
