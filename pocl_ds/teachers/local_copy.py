"""Copies of a teacher cache on the local disk of each node (`teacher_cache.local_copy`).

Copies stay: $SLURM_TMPDIR and the like are emptied by SLURM, a cache takes long to copy, and
another job of the same node may be reading one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError
from pocl_ds.runtime import distributed
from pocl_ds.workflow.files import file_digest
from pocl_ds.workflow.local_copy import copy_files, expand_folder
from pocl_ds.workflow.manifest import MANIFEST, read_manifest

FIELD = "teacher_cache.local_copy"


def open_local_copy(directory: Path, fingerprint: str, local_copy: str) -> Path:
    """The folder with this node's copy of the cache of one teacher. All ranks call it together, and
    one of each node copies.

    directory: of the cache. fingerprint: of the cache, which is finished. local_copy: of the
    recipe, with variables of the environment. Raises as `expand_folder` and `copy_files`.
    """
    with distributed.raise_on_all_ranks("copy the teacher cache to the local disk"):
        target = expand_folder(local_copy, FIELD) / f"teacher-cache-{fingerprint[:16]}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            copy_cache(directory, target)
    return target


def copy_cache(directory: Path, target: Path) -> None:
    """Copy the cache of one teacher, as far as `target` does not have it. Raises as
    `copy_files`.
    """
    copy_files(
        directory,
        _cache_files(directory),
        target,
        name="teacher cache",
        field=FIELD,
        remedy=f"remove it and {directory / MANIFEST}, and run `pocl cache-teacher`, which writes "
        "it again",
    )


def _cache_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file of a finished cache; its manifests come last."""
    files: dict[str, dict[str, Any]] = {}
    names = sorted(path.name for path in directory.glob(f"*.{MANIFEST}")) + [MANIFEST]
    for name in names:
        manifest = read_manifest(directory, name)
        if manifest is None:
            raise ArtifactError(
                f"{directory / name} is missing: run `pocl cache-teacher` before training"
            )
        files |= manifest.files
    return files | {name: file_digest(directory / name) for name in names}
