"""Whether the files of a run are those that its steps wrote: the inputs of a step before it reads
them, and all results of a run for `pocl verify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pocl_ds.config import Recipe
from pocl_ds.errors import ArtifactError
from pocl_ds.runtime.progress import Progress
from pocl_ds.training.checkpoint_files import misnamed_checkpoint
from pocl_ds.workflow.manifest import MANIFEST, changed_files, damaged_files, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEP, STEPS, Step

# Each row of the teacher cache has a checksum, which training compares when it reads the row.
VERIFIED_WHEN_READ = ("cache-teacher",)


@dataclass(frozen=True)
class VerifiedResult:
    """A result of a run, or a part of one, and what is wrong with it."""

    name: str  # its manifest, relative to the run directory
    files: int
    bytes: int
    faults: list[str]


def check_inputs(run: RunDirectory, recipe: Recipe, name: str) -> None:
    """Check the results that the step `name` reads against their checksums. Those that have not
    changed since an earlier check are not read again.

    Raises ArtifactError with the first damaged file, and the command that makes it again.
    """
    needed = _upstream(STEP[name], recipe) - set(VERIFIED_WHEN_READ)
    for step in STEPS:
        if step.name not in needed:
            continue
        directory = step.directory(run)
        pattern = f"*.{MANIFEST}" if step.name == "score" else MANIFEST
        for path in sorted(directory.glob(pattern)):
            manifest = read_manifest(directory, path.name)
            if manifest and (faults := changed_files(directory, manifest, path.name)):
                raise ArtifactError(
                    f"{directory} is damaged ({faults[0]}): run `pocl {step.name}` again, which "
                    "repeats what is damaged"
                )


def verify_run(run: RunDirectory) -> list[VerifiedResult]:
    """Compare every file that any manifest of a run lists with its checksum. Reads all of them."""
    paths = list(_manifests(run.path))
    results = []
    with Progress(len(paths), "results", "verify", min_seconds=2.0) as progress:
        for path in paths:
            results.append(_verify(run, path))
            progress.advance()
    return results


def _upstream(step: Step, recipe: Recipe) -> set[str]:
    """The steps whose results a step reads, also through others."""
    names = {
        name
        for name in (*step.dependencies_of(recipe), *step.waits_for)
        if STEP[name].enabled(recipe)
    }
    return names.union(*(_upstream(STEP[name], recipe) for name in names))


def _manifests(folder: Path) -> Iterator[Path]:
    """The manifests in a folder and below it; links are not followed."""
    for path in sorted(folder.rglob(f"*{MANIFEST}")):
        if path.is_file() and not path.name.startswith("."):
            yield path


def _verify(run: RunDirectory, path: Path) -> VerifiedResult:
    name = str(path.relative_to(run.path))
    try:
        manifest = read_manifest(path.parent, path.name)
        if manifest is None:
            return VerifiedResult(name, 0, 0, ["it was removed"])
        faults = damaged_files(path.parent, manifest)
        if manifest.step == "checkpoint" and not faults:
            faults = misnamed_checkpoint(path.parent, manifest)
    except (ArtifactError, OSError) as error:
        return VerifiedResult(name, 0, 0, [str(error)])
    size = sum(int(entry["bytes"]) for entry in manifest.files.values())
    return VerifiedResult(name, len(manifest.files), size, faults)
