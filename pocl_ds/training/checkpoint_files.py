"""Names and verification of checkpoints on disk."""

from __future__ import annotations

import re
from pathlib import Path

from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import (
    DamagedManifestError,
    Manifest,
    damaged_files,
    read_manifest,
)

PREFIX, PARTIAL, DAMAGED, STATE = "step-", ".partial", ".damaged", "trainer.json"


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def step_of_name(name: str, suffix: str = "") -> int | None:
    """The step of a checkpoint's folder; None for other names, such as those of copies that
    somebody made by hand.
    """
    match = re.fullmatch(f"{PREFIX}([0-9]{{8,18}}){re.escape(suffix)}", name)
    step = int(match[1]) if match else None
    return step if step is not None and name == checkpoint_name(step) + suffix else None


def checkpoint_steps(directory: Path, suffix: str = "") -> list[int]:
    """Steps of the folders in `directory` that have the name of a checkpoint and that suffix,
    ascending.
    """
    steps = (step_of_name(path.name, suffix) for path in directory.glob("*") if path.is_dir())
    return sorted(step for step in steps if step is not None)


def verify_checkpoint(path: Path) -> tuple[Manifest | None, list[str]]:
    """A checkpoint's manifest, and what is wrong with the checkpoint: damaged files, or the folder
    of another step. Raises ArtifactError for a checkpoint of another version of this program.
    """
    try:
        manifest = readable_manifest(path)
        if manifest is None:
            return None, ["manifest.json is missing or damaged"]
        return manifest, damaged_files(path, manifest) or misnamed_checkpoint(path, manifest)
    except OSError as error:
        return None, [f"it cannot be read ({error.strerror})"]


def misnamed_checkpoint(path: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the name of a checkpoint: somebody may have exchanged folders."""
    if step_of_name(path.name) is None:
        return []
    for step in (int(manifest.info["step"]), int(read_json(path / STATE)["step"])):
        if path.name != checkpoint_name(step):
            return [f"it is the checkpoint of step {step}"]
    return []


def readable_manifest(path: Path) -> Manifest | None:
    """A checkpoint's manifest, None if it is missing or damaged. Raises ArtifactError for one of
    another schema.
    """
    try:
        return read_manifest(path)
    except DamagedManifestError:
        return None
