"""Checkpoints of a training: whole or not at all.

A checkpoint is built under a temporary name by all ranks; then its files are digested, the manifest is written, the
directory gets its name, and only then do older ones go. A name without the suffix is therefore always a whole one.
What a rank's random numbers, samples and schedules are follows from the step alone (see `curriculum.sampler`,
`engine.seed_step`), so the state is the engine's shards and one number.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocl_ds import distributed
from pocl_ds.artifacts import (
    Manifest,
    damaged_files,
    disk_faults,
    file_digest,
    package_versions,
    read_json,
    read_manifest,
    sync_directory,
    write_json,
)
from pocl_ds.distill.engine import Engine
from pocl_ds.errors import ArtifactError, ResourceError

log = logging.getLogger("pocl_ds")

PREFIX, PARTIAL, STATE = "step-", ".partial", "trainer.json"
# What torch's writer says when the disk is full; it does not keep the errno.
FULL_DISK = ("PytorchStreamWriter failed", "No space left", "file write failed", "unexpected pos")


class Checkpoints:
    """The checkpoints of one training directory."""

    def __init__(self, directory: Path, *, keep: int, fingerprint: str) -> None:
        self.directory, self.keep, self.fingerprint = directory, keep, fingerprint

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> None:
        """Write a checkpoint; all ranks together. Raises ResourceError on the rank whose disk is full."""
        final = self.directory / f"{PREFIX}{step:08d}"
        partial = final.with_suffix(PARTIAL)
        if distributed.rank() == 0:
            with disk_faults(partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        distributed.barrier()
        try:
            engine.save(partial)
            if distributed.rank() == 0:
                write_json(partial / STATE, {"step": step, "ranks": distributed.world_size(), **state})
            distributed.barrier()
            files = self._digests(partial)
        except (OSError, RuntimeError) as error:
            if _disk_is_full(error):
                shutil.rmtree(partial, ignore_errors=True)
                raise ResourceError(
                    f"the disk is full while saving step {step} to {self.directory}: free some space and start again, "
                    "training goes on from the checkpoint before"
                ) from error
            raise
        if distributed.rank() == 0:
            manifest = Manifest("checkpoint", self.fingerprint, files, {"step": step}, package_versions())
            write_json(partial / "manifest.json", asdict(manifest))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync_directory(self.directory)
            self._retire()
        distributed.barrier()

    def load(self, engine: Engine) -> int:
        """Put the newest whole checkpoint into the engine; all ranks together. Returns its step, 0 where there is none."""
        chosen = distributed.from_rank_zero(self._newest_whole() if distributed.rank() == 0 else None)
        if isinstance(chosen, str):
            raise ArtifactError(chosen)
        if chosen is None:
            return 0
        path = Path(chosen["path"])
        engine.load(path)
        return int(chosen["step"])

    def steps(self) -> list[int]:
        """Steps of the checkpoints with a final name, oldest first."""
        names = (p.name for p in self.directory.glob(f"{PREFIX}*") if p.is_dir() and p.suffix != PARTIAL)
        return sorted(int(name.removeprefix(PREFIX)) for name in names)

    def _newest_whole(self) -> dict[str, Any] | str | None:
        """{"path", "step"} of the newest verified checkpoint; a sentence where it cannot be used; None where none is."""
        for leftover in self.directory.glob(f"*{PARTIAL}"):
            log.info("removing %s, the remains of a save that was cut short", leftover)
            shutil.rmtree(leftover, ignore_errors=True)
        steps = self.steps()
        for step in reversed(steps):
            path = self.directory / f"{PREFIX}{step:08d}"
            manifest = read_manifest(path)
            faults = ["manifest.json is missing"] if manifest is None else damaged_files(path, manifest)
            if faults or manifest is None:
                log.warning("checkpoint %s is damaged (%s): looking for the one before", path, "; ".join(faults))
                continue
            if manifest.fingerprint != self.fingerprint:
                return f"checkpoint {path} belongs to another recipe or other data: use another --run-dir"
            ranks = read_json(path / STATE)["ranks"]
            if ranks != distributed.world_size():
                return (f"checkpoint {path} was written by {ranks} ranks, this start has {distributed.world_size()}: "
                        f"start with launch.ranks={ranks}")
            return {"path": str(path), "step": step}
        if steps:
            return f"none of the checkpoints in {self.directory} is whole: remove that directory to train from the start"
        return None

    def _digests(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Size and checksum of every file; ranks share the reading."""
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        mine = files[distributed.rank() :: distributed.world_size()]
        parts = distributed.gather_objects({str(p.relative_to(partial)): file_digest(p) for p in mine})
        return {name: digest for part in parts for name, digest in part.items()}

    def _retire(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.directory / f"{PREFIX}{step:08d}", ignore_errors=True)


def _disk_is_full(error: OSError | RuntimeError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in FULL_DISK)
