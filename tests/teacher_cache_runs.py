"""The step `cache-teacher` on a few samples, for tests of its backends.

Other processes import this too (`PYTHONPATH=tests`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.config import (
    StudentConfig,
    TeacherCacheConfig,
    TeacherConfig,
    TeacherEndpointConfig,
)
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.teachers.cache import TeacherCache
from pocl_ds.teachers.cache_plan import open_cache
from pocl_ds.teachers.cache_step import cache_teacher
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.workflow.manifest import Manifest, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

LENGTHS, PROMPT, FINGERPRINT, TEMPERATURES = (90, 20, 64, 65, 40, 30, 128), 5, "f", (1.0, 2.0)


def sequences() -> list[list[int]]:
    """Random tokens of the tiny models' vocabulary."""
    draw = np.random.default_rng(0)
    return [draw.integers(2, 300, length).tolist() for length in LENGTHS]


def write_data(folder: Path) -> RunDirectory:
    """A run directory with a training and a validation split."""
    run = RunDirectory(folder)
    if not run.data.is_dir():
        run.data.mkdir(parents=True)
        names = [f"s{row}" for row in range(len(LENGTHS))]
        save_split(run.data, "train", names, sequences(), [PROMPT] * len(LENGTHS))
        save_split(run.data, "validation", names[:1], sequences()[:1], [PROMPT])
    return run


def write_cache(
    folder: Path,
    model: Path,
    *,
    student: Path | None = None,
    mode: Any = "cached_hidden_states",
    quantization: Any = "none",
    shard: int | None = None,
    visits: float = 2.0,
    endpoint: dict[str, Any] | None = None,
    temperatures: tuple[float, ...] = TEMPERATURES,
    **config: Any,
) -> RunDirectory:
    """Run the step. student: by default the teacher. config: fields of section `teacher_cache`."""
    run = write_data(folder)
    cache_teacher(
        run,
        teacher=TeacherConfig(
            model=str(model),
            mode=mode,
            quantization=quantization,
            ds_config=None,
            endpoint=TeacherEndpointConfig(**endpoint) if endpoint else None,
        ),
        student=StudentConfig(model=str(student or model)),
        config=TeacherCacheConfig(**{"top_k": 6, "num_samples": 9, **config}),
        usage=TeacherUsage(visits, temperatures),
        seed=0,
        fingerprint=FINGERPRINT,
        model_fingerprints={"teacher": FINGERPRINT},
        shard=shard,
    )
    return run


def train_split(run: RunDirectory) -> TokenizedSplit:
    """The training split of a run."""
    return TokenizedSplit.open(run.data, "train")


def open_train_cache(run: RunDirectory) -> TeacherCache:
    """The cache of the training split."""
    return open_cache(run.teacher_cache, FINGERPRINT, "teacher", [train_split(run)])


def cache_manifest(run: RunDirectory) -> Manifest:
    """The manifest of the teacher's cache."""
    (folder,) = (path.parent for path in run.teacher_cache.glob("*/manifest.json"))
    manifest = read_manifest(folder)
    assert manifest
    return manifest
