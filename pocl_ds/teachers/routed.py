"""Teachers by stage of the curriculum or by domain of the sample: each sample has one of several
teachers, and the loss stays the mean over the step's loss tokens (docs/method.md, eq. 10).

By stage, only the teacher of the current stage is in memory, or its cache is open. By domain, all
teachers are, and a micro-batch has the samples of one of them.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import TeacherConfig
from pocl_ds.data.batches import Batch
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.data.split_sources import read_split_domains
from pocl_ds.errors import ArtifactError
from pocl_ds.runtime import distributed
from pocl_ds.teachers.remote import RemoteTeacher
from pocl_ds.teachers.teacher import CachedTeacher, OnlineTeacher

log = logging.getLogger("pocl_ds")

SingleTeacher: TypeAlias = OnlineTeacher | CachedTeacher | RemoteTeacher


@dataclass(frozen=True)
class RoutedModel:
    """One of several teachers. label: its name in the recipe, for metrics. fields: those of section
    `teacher` that name it.
    """

    label: str
    path: str
    fields: tuple[str, ...] = ()


def distinct_models(teacher: TeacherConfig, paths: Sequence[str]) -> tuple[RoutedModel, ...]:
    """The different teachers, the first one first. Those of one folder are one.

    paths: of `teacher.sources`.
    """
    models: dict[str, RoutedModel] = {}
    for (name, source), path in zip(teacher.named_sources.items(), paths, strict=True):
        model = models.get(path, RoutedModel(source.label, path))
        models[path] = RoutedModel(model.label, path, (*model.fields, name))
    return tuple(models.values())


def _number_of(models: Sequence[RoutedModel], name: str) -> int:
    """Place of the model that a field names; without the field, that of the first one."""
    return next((number for number, model in enumerate(models) if name in model.fields), 0)


def models_of_stages(models: Sequence[RoutedModel], stages: int) -> list[int]:
    """Place among the models of each stage's teacher: [stages]."""
    return [_number_of(models, f"teacher.by_stage.{stage}") for stage in range(1, stages + 1)]


def models_of_rows(models: Sequence[RoutedModel], data: Path) -> dict[str, NDArray[np.int64]]:
    """Place among the models of the teacher of each training and validation sample, by its domain:
    split -> [samples]. data: the folder. Raises ArtifactError if the data has no domains.
    """
    rows = {}
    for split in ("train", "validation"):
        domains = read_split_domains(data, split)
        if domains is None:
            raise ArtifactError(
                f"{data} has no domains, which teacher.by_domain needs: run `pocl preprocess`"
            )
        places = [_number_of(models, f"teacher.by_domain.{name}") for name in domains.names]
        rows[split] = np.array(places, np.int64)[domains.numbers]
    return rows


class StageTeachers:
    """The teachers of the stages of a curriculum, of which one is in memory.

    models: the different teachers. model_of_stage: place among them, for each stage. load: loads a
    model, or opens its cache. All ranks call every method together.
    """

    def __init__(
        self,
        models: Sequence[RoutedModel],
        model_of_stage: Sequence[int],
        load: Callable[[RoutedModel], SingleTeacher],
    ) -> None:
        self.models, self.model_of_stage, self._load = tuple(models), tuple(model_of_stage), load
        # Called with each model that was loaded, and its path.
        self.on_load: list[Callable[[OnlineTeacher | RemoteTeacher, str], None]] = []
        self._teacher: SingleTeacher | None = None
        self._number = -1  # of the teacher in memory

    def number_of(self, stage: int) -> int:
        """Place among `models` of the teacher of a stage, counted from 0."""
        return self.model_of_stage[stage]

    def start_stage(self, stage: int) -> None:
        """Load the teacher of a stage, counted from 0, and free the one before. Does nothing if it
        is in memory.
        """
        number = self.number_of(stage)
        if number == self._number:
            return
        if self._teacher is not None:
            start = time.monotonic()
            self._free()
            former = self.models[self._number].path
            log.info("freed the teacher %s: seconds=%.1f", former, time.monotonic() - start)
        start = time.monotonic()
        model = self.models[number]
        self._teacher, self._number = self._load(model), number
        if isinstance(self._teacher, RemoteTeacher):
            self._teacher.wait_until_loaded()
        seconds = time.monotonic() - start
        log.info("stage %d has the teacher %s: seconds=%.1f", stage + 1, model.path, seconds)
        if not isinstance(self._teacher, CachedTeacher):
            for callback in self.on_load:
                callback(self._teacher, model.path)

    @property
    def current(self) -> SingleTeacher:
        """The teacher of the current stage."""
        assert self._teacher is not None, "no stage was started"
        return self._teacher

    def of_batch(self, batch: Batch) -> SingleTeacher:
        """The teacher of a micro-batch: that of the current stage."""
        return self.current

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> str | None:
        """See `Teacher`. The rows are those of the current stage."""
        return self.current.find_damage(split, rows)

    def read(self, dataset: TokenizedDataset, batch: Batch) -> Batch:
        """See `CachedTeacher`. The rows are those of the current stage."""
        assert isinstance(self.current, CachedTeacher)
        return self.current.read(dataset, batch)

    def _free(self) -> None:
        """Release the teacher in memory."""
        self.current.close()
        self._teacher = None
        free_memory()


def free_memory() -> None:
    """Free the memory of models that have no owner any more: they are part of reference cycles."""
    gc.collect()
    if distributed.device().type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class DomainTeachers:
    """The teachers of the domains of the samples, all in memory.

    models: the different teachers. teachers: by their place among the models; cached ones that no
    sample has are missing. model_of_row: place of each sample's teacher, split -> [samples].
    """

    models: tuple[RoutedModel, ...]
    teachers: Mapping[int, SingleTeacher] = field(repr=False)
    model_of_row: Mapping[str, NDArray[np.int64]] = field(repr=False)

    def of_batch(self, batch: Batch) -> SingleTeacher:
        """The teacher of a micro-batch."""
        return self.teachers[batch.teacher_number]

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> str | None:
        """See `Teacher`. Models can read any row."""
        for number, teacher in self.teachers.items():
            if isinstance(teacher, CachedTeacher):
                own = rows[self.model_of_row[split][rows] == number]
                if damage := teacher.find_damage(split, own):
                    return damage
        return None

    def read(self, dataset: TokenizedDataset, batch: Batch) -> Batch:
        """See `CachedTeacher`."""
        teacher = self.of_batch(batch)
        assert isinstance(teacher, CachedTeacher)
        return teacher.read(dataset, batch)
