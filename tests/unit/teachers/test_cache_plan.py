"""Which samples each teacher caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pocl_ds.config import TeacherConfig
from pocl_ds.data.split_sources import SplitLabels
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.teachers.cache_plan import PlannedCache, plan_caches
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.workflow.run_dir import RunDirectory

SIZES = {"train": 6, "validation": 2}
DOMAINS = {"train": [0, 1, 0, 2, 1, 0], "validation": [1, 1]}
NAMES = ("chat", "math", "code")


def plan(folder: Path, usage: TeacherUsage | None = None, **routes: Any) -> list[PlannedCache]:
    run, splits = RunDirectory(folder), []
    for split, size in SIZES.items():
        run.data.mkdir(exist_ok=True)
        save_split(
            run.data, split, [f"{split}{i}" for i in range(size)], [[1, 2]] * size, [1] * size
        )
        SplitLabels(NAMES, np.array(DOMAINS[split], np.uint16)).write(run.data, split, "domains")
        splits.append(TokenizedSplit.open(run.data, split))
    teacher = TeacherConfig(model="first", mode="cached_hidden_states", **routes)
    paths = [source.model for source in teacher.sources]
    names = dict.fromkeys(teacher.named_sources, "f")
    return plan_caches(run, teacher, paths, splits, usage or TeacherUsage(1.0), names)


def rows(caches: list[PlannedCache]) -> dict[str, tuple[list[int], list[int]]]:
    """Training and validation rows of each model."""
    return {
        cache.model.path: (cache.rows["train"].tolist(), cache.rows["validation"].tolist())
        for cache in caches
    }


def array(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def test_a_single_teacher_has_all_samples(tmp_path: Path) -> None:
    assert rows(plan(tmp_path)) == {"first": ([0, 1, 2, 3, 4, 5], [0, 1])}


def test_each_sample_is_cached_once_by_domain(tmp_path: Path) -> None:
    caches = plan(tmp_path, by_domain={"math": {"model": "second"}})
    assert rows(caches) == {"first": ([0, 2, 3, 5], []), "second": ([1, 4], [0, 1])}
    other, same = {"model": "other"}, {"model": "same"}
    caches = plan(tmp_path, by_domain={"math": same, "chat": other, "code": same})
    assert rows(caches) == {"same": ([1, 3, 4], [0, 1]), "other": ([0, 2, 5], [])}
    assert caches[0].model.fields == ("teacher.by_domain.math", "teacher.by_domain.code")
    assert caches[0].teacher.model == "same" and not caches[0].teacher.by_domain


@pytest.mark.parametrize("has_baseline", [False, True])
def test_teachers_have_the_samples_of_their_stages(has_baseline: bool, tmp_path: Path) -> None:
    second = {"model": "second"}
    usage = TeacherUsage(1.0, (1.0,), [array(4, 1), array(4, 1, 3), None], has_baseline)
    everything = [0, 1, 2, 3, 4, 5]
    caches = plan(tmp_path, usage, by_stage={3: second})
    first = everything if has_baseline else [1, 3, 4]
    assert rows(caches) == {"first": (first, [0, 1]), "second": (everything, [0, 1])}

    # A teacher that no stage has is not cached, unless the baseline needs it.
    usage = TeacherUsage(1.0, (1.0,), [array(4, 1), array(3)], has_baseline)
    caches = plan(tmp_path, usage, by_stage={1: second, 2: second})
    assert rows(caches).pop("second") == ([1, 3, 4], [0, 1])
    assert ("first" in rows(caches)) == has_baseline


def test_the_folder_depends_on_the_samples(tmp_path: Path) -> None:
    stages = [[array(0), array(0, 1)], [array(0), array(0, 1)], [array(0), array(0, 2)]]
    (first, second), (same, also), (again, differs) = (
        [c.directory.name for c in plan(tmp_path, usage, by_stage={2: {"model": "second"}})]
        for usage in (TeacherUsage(1.0, (1.0,), rows_by_stage) for rows_by_stage in stages)
    )
    assert first == same == again and second == also != differs
