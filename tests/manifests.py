"""Changing results that have a manifest, so that they still count as what a step wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pocl_ds.workflow.files import file_digest
from pocl_ds.workflow.manifest import read_manifest, save_manifest


def edit_manifest(path: Path, **changes: Any) -> None:
    """Replace fields of a manifest, and entries of its `info`."""
    manifest = read_manifest(path.parent, path.name)
    assert manifest is not None
    if "info" in changes:
        changes["info"] = {**manifest.info, **changes["info"]}
    save_manifest(path, dataclasses.replace(manifest, **changes))


def seal(path: Path) -> None:
    """Record today's files in a manifest."""
    manifest = read_manifest(path.parent, path.name)
    assert manifest is not None
    edit_manifest(path, files={name: file_digest(path.parent / name) for name in manifest.files})
