"""Which teacher a stage or a sample has, and when it is loaded and freed."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pocl_ds.config import TeacherConfig
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.data.split_sources import SplitLabels
from pocl_ds.errors import ArtifactError
from pocl_ds.teachers.routed import (
    DomainTeachers,
    RoutedModel,
    StageTeachers,
    distinct_models,
    models_of_rows,
    models_of_stages,
)
from pocl_ds.teachers.teacher import CachedTeacher
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.workflow.run_dir import RunDirectory

MODELS = (RoutedModel("org/small", "/small"), RoutedModel("org/large", "/large"))


class FakeTeacher:
    """A teacher in a reference cycle, as a model of ZeRO-3 is."""

    def __init__(self, path: str) -> None:
        self.path, self.closed = path, False
        self.engine = SimpleNamespace(owner=self)

    def close(self) -> None:
        self.closed = True


def test_one_teacher_is_in_memory_and_is_loaded_once_for_stages_that_share_it() -> None:
    loaded: list[Any] = []

    def load(model: RoutedModel) -> Any:
        assert all(reference() is None for reference in loaded), "the former one is in memory"
        teacher = FakeTeacher(model.path)
        loaded.append(weakref.ref(teacher))
        return teacher

    teachers, checked = StageTeachers(MODELS, [0, 1, 1, 0], load), list[str]()
    teachers.on_load.append(lambda teacher, path: checked.append(path))
    models, batch = TrainingModels(SimpleNamespace(), teachers), SimpleNamespace()  # type: ignore[arg-type]
    paths = []
    for stage in (0, 0, 1, 2, 3):
        models.start_stage(stage)
        paths.append(models.teacher_of(batch).path)  # type: ignore[arg-type,union-attr]
    assert paths == ["/small", "/small", "/large", "/large", "/small"]
    assert checked == ["/small", "/large", "/small"]
    assert models.metrics_of_teachers(2, None) == {"teacher": "org/large"}
    numbers = models.teacher_numbers(2, None, np.arange(3))
    assert numbers is not None and numbers.tolist() == [1, 1, 1]


def test_a_micro_batch_has_the_teacher_of_its_number() -> None:
    loaded: Any = {0: FakeTeacher("/small"), 1: FakeTeacher("/large")}
    models = TrainingModels(SimpleNamespace(), DomainTeachers(MODELS, loaded, {}))  # type: ignore[arg-type]
    batch: Any = SimpleNamespace(teacher_number=1)
    assert models.teacher_of(batch) is loaded[1]
    samples = models.metrics_of_teachers(0, np.array([1, 0, 1]))
    assert samples == {"teacher_samples": {"org/small": 1, "org/large": 2}}
    plain = TrainingModels(SimpleNamespace(), NoTeacher())  # type: ignore[arg-type]
    assert plain.metrics_of_teachers(0, None) == {}
    plain.start_stage(3)


def test_a_response_of_the_student_has_the_teacher_of_its_prompt() -> None:
    generated = GeneratedBatch(
        rows=np.array([4, 0, 3]),
        ids=np.array([b"e", b"a", b"d"]),
        prompt_tokens=np.ones(3, np.int64),
        sequences=[np.array([1, 2], np.uint32)] * 3,
    )
    train: Any = SimpleNamespace()
    data = TrainingData(train, np.arange(5), None, Layout(True, 0.0), 2)
    assert data.sample_teachers(generated, np.arange(3)) is None
    data.teacher_of_row = {"train": np.array([0, 1, 1, 0, 2])}
    teachers = data.sample_teachers(generated, np.array([0, 2]))
    assert teachers is not None and teachers.tolist() == [2, 0]


class FakeCache(CachedTeacher):
    """A cache of some rows, of which one is damaged."""

    def __init__(self, rows: set[int], damaged: int) -> None:
        self.rows, self.damaged = rows, damaged

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> str | None:
        assert set(rows.tolist()) <= self.rows
        return f"row {self.damaged}" if self.damaged in rows else None


def test_damage_is_looked_for_in_the_cache_of_each_row() -> None:
    rows_of = {"train": np.array([0, 1, 1, 0])}
    caches = {0: FakeCache({0, 3}, 3), 1: FakeCache({1, 2}, 2)}
    teachers = DomainTeachers(MODELS, caches, rows_of)
    assert teachers.find_damage("train", np.array([1, 0])) is None
    assert teachers.find_damage("train", np.array([1, 2, 0])) == "row 2"
    assert teachers.find_damage("train", np.array([3, 1])) == "row 3"
    online: Any = {0: FakeTeacher("/small"), 1: FakeTeacher("/large")}
    assert DomainTeachers(MODELS, online, rows_of).find_damage("student", np.arange(9)) is None

    by_stage = StageTeachers(MODELS, [0, 1], lambda model: caches[MODELS.index(model)])
    for stage, row in ((0, 3), (1, 2)):
        by_stage.start_stage(stage)
        assert by_stage.find_damage("train", np.array([row])) == f"row {row}"


def models_of(paths: tuple[str, ...], **routes: Any) -> tuple[RoutedModel, ...]:
    teacher = TeacherConfig.model_validate({"model": "org/first", **routes})
    return distinct_models(teacher, paths)


def test_stages_of_one_folder_share_a_teacher() -> None:
    routes = {2: {"model": "org/b"}, 3: {"model": "org/b", "revision": "main"}, 4: {"model": "c"}}
    models = models_of(("/a", "/b", "/b", "/c"), by_stage=routes)
    assert [model.path for model in models] == ["/a", "/b", "/c"]
    assert models[1].label == "org/b"
    assert models_of_stages(models, 5) == [0, 1, 1, 2, 0]


def test_a_domain_without_a_teacher_of_its_own_has_the_first(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.data.mkdir(parents=True)
    routes = {"math": {"model": "org/b"}, "code": {"model": "org/first"}}
    models = models_of(("/a", "/b", "/a"), by_domain=routes)
    with pytest.raises(ArtifactError, match="has no domains"):
        models_of_rows(models, run.data)
    for split, numbers in (("train", [0, 1, 2, 1]), ("validation", [1, 0])):
        labels = SplitLabels(("chat", "math", "code"), np.array(numbers, np.uint16))
        labels.write(run.data, split, "domains")
    rows = models_of_rows(models, run.data)
    assert {split: part.tolist() for split, part in rows.items()} == {
        "train": [0, 1, 0, 1],
        "validation": [1, 0],
    }
