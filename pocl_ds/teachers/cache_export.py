"""`pocl cache-teacher --export`: a finished teacher cache as a folder that other runs and machines
can import (`cache_format`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from pocl_ds.errors import ArtifactError
from pocl_ds.runtime.formatting import format_size
from pocl_ds.teachers.cache import TeacherCache
from pocl_ds.teachers.cache_format import (
    METADATA,
    CacheMetadata,
    DataIdentity,
    ExportedTeacher,
    ModelIdentity,
    read_metadata,
    sample_key,
    verify_files,
    vocabulary_identity,
    write_metadata,
)
from pocl_ds.teachers.cache_plan import PlannedCache
from pocl_ds.teachers.cache_shard import STEP
from pocl_ds.teachers.cache_step import CacheLayout
from pocl_ds.teachers.quantized_states import FILE as CHANNELS
from pocl_ds.workflow.files import atomic_directory, file_digest, remove_partial_directories
from pocl_ds.workflow.manifest import Manifest, finished_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

FILE_BYTES = 1 << 30  # of the outputs in one file of the export


def export_cache(
    run: RunDirectory,
    target: Path,
    layout: CacheLayout,
    *,
    fingerprint: str,
    data: DataIdentity,
    models: Mapping[str, ModelIdentity],
    hidden_dtype: str,
) -> None:
    """Write the folder `target`, which appears complete or not at all; nothing if it has this
    cache already.

    fingerprint: of the step. models: of each teacher, by its field. Raises ArtifactError if the
    cache is unfinished or damaged, or if `target` holds something else.
    """
    manifest = finished_manifest(run.teacher_cache, fingerprint)
    if manifest is None:
        raise ArtifactError(
            f"{run.teacher_cache} holds no complete cache of this teacher and data: run `pocl "
            f"{STEP}` without --export first"
        )
    if manifest.info["mode"] == "online":
        raise ArtifactError(
            f"teacher.mode=auto selected online in {run.teacher_cache}: there is no cache to "
            "export; set teacher.mode=cached_hidden_states"
        )
    if _is_exported(target, fingerprint):
        log.info("%s: %s has this cache already", STEP, target)
        return
    remove_partial_directories(target.absolute())
    with atomic_directory(target) as folder:
        teachers, codec, backend = [], None, ""
        for number, cache in enumerate(layout.caches):
            own = finished_manifest(cache.directory, cache.fingerprint)
            assert own is not None
            stored = TeacherCache(cache.directory, layout.splits, fingerprint=cache.fingerprint)
            codec, backend = own.info.get("codec"), own.info["backend"]
            name = f"teacher-{number}"
            _write_outputs(folder / name, cache, stored, layout)
            _copy_files(folder / name, cache.directory)
            teachers.append(_describe(name, cache, models[cache.model.fields[0]], own))
        files = {
            path.relative_to(folder).as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_metadata(
            folder,
            CacheMetadata(
                versions=manifest.versions,
                fingerprint=fingerprint,
                mode=manifest.info["mode"],
                backend=backend,
                hidden_dtype=hidden_dtype,
                codec=codec,
                vocabulary=vocabulary_identity(layout.vocab),
                data=data,
                teachers=teachers,
                files=files,
            ),
        )
    size = sum(entry["bytes"] for entry in files.values())
    log.info("%s: exported %s to %s", STEP, format_size(size), target)


def _is_exported(target: Path, fingerprint: str) -> bool:
    """Whether the folder has a complete export of this cache. Raises ArtifactError if it holds
    anything else than an export of it, which may be damaged.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        if not (target / METADATA).is_file():
            raise ArtifactError(f"{target} is not empty: choose another folder for the export")
        try:
            metadata = read_metadata(target)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; or remove {target} to export it again") from None
        if metadata.fingerprint != fingerprint:
            raise ArtifactError(
                f"{target} holds the export of another teacher cache: choose another folder"
            )
        try:
            verify_files(target, metadata)
        except ArtifactError as error:
            log.warning("%s: exporting again, since %s", STEP, error)
            return False
        return True
    return False


def _write_outputs(
    folder: Path, cache: PlannedCache, stored: TeacherCache, layout: CacheLayout
) -> None:
    """Write the files `shard-*.safetensors`. Raises ArtifactError for a damaged row."""
    folder.mkdir()
    number = 0
    for split in layout.splits:
        token_bytes = max(1, stored.read(split.name, ()).element_size() * stored.width)
        rows, tokens = cache.rows[split.name], np.asarray(split.loss_tokens, np.int64)
        for part in _parts(rows, tokens[rows] * token_bytes):
            if damage := stored.find_damage(split.name, part):
                raise ArtifactError(damage)
            keys = b"".join(sample_key(split, int(row)) for row in part)
            save_file(
                {
                    "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, 32),
                    "loss_tokens": torch.from_numpy(tokens[part]),
                    "outputs": stored.read(split.name, tuple(part.tolist())),
                },
                folder / f"shard-{number:05d}.safetensors",
            )
            number += 1


def _parts(rows: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Divide rows of these sizes into consecutive parts of at most FILE_BYTES, unless one row is
    larger.
    """
    start, total = 0, 0
    for place, size in enumerate(sizes.tolist()):
        if place > start and total + size > FILE_BYTES:
            yield rows[start:place]
            start, total = place, 0
        total += size
    if start < len(rows):
        yield rows[start:]


def _copy_files(folder: Path, directory: Path) -> None:
    """Copy the head and the calibration of hidden states, as far as the cache has them."""
    if (directory / "head").is_dir():
        shutil.copytree(directory / "head", folder / "head")
    if (directory / CHANNELS).is_file():
        shutil.copyfile(directory / CHANNELS, folder / CHANNELS)


def _describe(
    name: str, cache: PlannedCache, model: ModelIdentity, manifest: Manifest
) -> ExportedTeacher:
    info: dict[str, Any] = manifest.info
    return ExportedTeacher(
        folder=name,
        model=model,
        samples=sum(len(rows) for rows in cache.rows.values()),
        tokens=info["tokens"],
        width=info["width"],
        dtype=info["dtype"],
        state_dtype=info.get("state_dtype"),
        error=info.get("error"),
    )
