"""What the teacher cache holds: a folder for each teacher, with the samples that it is used for.

A single teacher has all samples, as has the teacher of the baseline. By domain each sample is in
the folder of its teacher, and by stage in those of the stages that train on it. Every teacher of a
stage has all validation samples.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import TeacherConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.teachers.cache import TeacherCache, missing_cache, write_rows
from pocl_ds.teachers.cache_shard import STEP
from pocl_ds.teachers.local_copy import open_local_copy
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.teachers.routed import (
    RoutedModel,
    distinct_models,
    models_of_rows,
    models_of_stages,
)
from pocl_ds.workflow.files import make_replaceable
from pocl_ds.workflow.manifest import Manifest, fingerprint, finished_manifest, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class PlannedCache:
    """The cache of one teacher. teacher: the section of that model alone. rows: ascending, split ->
    [samples].
    """

    model: RoutedModel
    teacher: TeacherConfig
    directory: Path
    fingerprint: str
    rows: Mapping[str, NDArray[np.int64]] = field(repr=False)

    @property
    def state_dtype(self) -> str:
        """The type of the teacher's hidden states."""
        return resolve_dtype(self.teacher.dtype)

    @property
    def manifest(self) -> Manifest | None:
        """Its manifest, if all of its shards are written. Rows are verified when they are read."""
        return finished_manifest(self.directory, self.fingerprint, checksums=False)

    @property
    def is_finished(self) -> bool:
        """Whether all of its shards are written."""
        return self.manifest is not None


def plan_caches(
    run: RunDirectory,
    teacher: TeacherConfig,
    paths: Sequence[str],
    splits: Sequence[TokenizedSplit],
    usage: TeacherUsage,
    model_fingerprints: Mapping[str, str],
) -> list[PlannedCache]:
    """The caches of all teachers that any sample has.

    paths: of `teacher.sources`. model_fingerprints: by field, see `cache_teacher`. The folder of a
    teacher has its fingerprint in its name, so that a change of one teacher leaves the others as
    they are. Raises ArtifactError if the data has no domains.
    """
    models = distinct_models(teacher, paths)
    caches = []
    for model, rows in zip(models, _rows_of_models(run, teacher, models, splits, usage)):
        if not any(map(len, rows.values())):
            continue
        digests = {name: hashlib.sha256(own.tobytes()).hexdigest() for name, own in rows.items()}
        name = model.fields[0]
        own_fingerprint = fingerprint([model_fingerprints[name], digests])
        caches.append(
            PlannedCache(
                model,
                teacher.of_source(teacher.named_sources[name]),
                run.teacher_cache / own_fingerprint[:16],
                own_fingerprint,
                rows,
            )
        )
    if len(models) > 1:
        for cache in caches:
            counts = ", ".join(f"{len(rows)} {name}" for name, rows in cache.rows.items())
            log.info("teacher %s: the cache has %s samples", cache.model.path, counts)
    return caches


def _rows_of_models(
    run: RunDirectory,
    teacher: TeacherConfig,
    models: Sequence[RoutedModel],
    splits: Sequence[TokenizedSplit],
    usage: TeacherUsage,
) -> list[dict[str, NDArray[np.int64]]]:
    """Ascending rows of the samples that each model is used for: split -> [samples]."""
    sizes = {split.name: len(split) for split in splits}
    used = [{name: np.zeros(size, bool) for name, size in sizes.items()} for _ in models]
    if teacher.by_domain:
        for name, numbers in models_of_rows(models, run.data).items():
            for number, own in enumerate(used):
                own[name] = numbers == number
    elif teacher.by_stage:
        numbers_and_rows = zip(
            models_of_stages(models, len(usage.stage_rows)), usage.stage_rows, strict=True
        )
        for number, rows in (*numbers_and_rows, *([(0, None)] if usage.has_baseline else [])):
            used[number]["train"][slice(None) if rows is None else rows] = True
            used[number]["validation"][:] = True
    else:
        used = [{name: np.ones(size, bool) for name, size in sizes.items()}]
    return [{name: np.flatnonzero(rows) for name, rows in own.items()} for own in used]


def prepare_caches(run: RunDirectory, caches: Sequence[PlannedCache]) -> None:
    """Make the folders, and remove those of teachers and samples that the recipe does not have any
    more, before anything is written. The tasks of a job array may call it at once.
    """
    run.teacher_cache.mkdir(parents=True, exist_ok=True)
    current = {cache.directory.name for cache in caches}
    for path in run.teacher_cache.iterdir():
        is_cache = not path.is_symlink() and any(path.glob("*.rows.npy"))
        if is_cache and path.name not in current:
            log.info(
                "%s: removing the cache of another teacher or of other samples: %s", STEP, path
            )
            shutil.rmtree(path, ignore_errors=True)
    for cache in caches:
        make_replaceable(cache.directory)
        for split, rows in cache.rows.items():
            if not cache.is_finished:
                write_rows(cache.directory, split, rows)


@dataclass(frozen=True)
class CacheReference:
    """The cache that a training reads. fingerprint: of the step. local_copy: of the recipe."""

    fingerprint: str
    local_copy: str | None = None


def open_cache(
    directory: Path,
    fingerprint: str,
    name: str,
    splits: list[TokenizedSplit],
    local_copy: str | None = None,
) -> TeacherCache:
    """The cache of one teacher. With `local_copy` all ranks call it together.

    directory: teacher_cache/ of the run. fingerprint: of the step. name: a field that names the
    teacher. Raises ArtifactError if the cache is missing, incomplete, or that of other teachers or
    data, and as `open_local_copy`.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.fingerprint != fingerprint:
        raise missing_cache(directory)
    for entry in manifest.info["teachers"]:
        if name in entry["fields"]:
            folder = directory / entry["folder"]
            if local_copy is not None:
                folder = open_local_copy(folder, entry["fingerprint"], local_copy)
            return TeacherCache(
                folder,
                splits,
                fingerprint=entry["fingerprint"],
                is_copy=local_copy is not None,
            )
    raise missing_cache(directory)
