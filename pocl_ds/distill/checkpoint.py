"""Checkpoints of a training: whole or not at all.

A checkpoint is built under a temporary name by all ranks; then its files are digested, the manifest is written, the
directory gets its name, and only then do older ones go. A name without the suffix is therefore always a whole one.
What a rank's random numbers, samples and schedules are follows from the step alone (see `curriculum.sampler`,
`engine.seed_step`), so the state is the engine's shards and one number.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
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
from pocl_ds.errors import ArtifactError, PoclError, ResourceError

log = logging.getLogger("pocl_ds")

PREFIX, PARTIAL, STATE = "step-", ".partial", "trainer.json"
RESHARDED = "resharded"  # a checkpoint of another number of ranks, rewritten; gone with the next save
FAILURES = 2  # failed saves in a row that end a run
# What torch's writer says when the disk is full; it does not keep the errno.
FULL_DISK = ("PytorchStreamWriter failed", "No space left", "file write failed", "unexpected pos")


class Checkpoints:
    """The checkpoints of one training directory."""

    def __init__(self, directory: Path, *, keep: int, fingerprint: str) -> None:
        self.directory, self.keep, self.fingerprint = directory, keep, fingerprint
        self.failures = 0  # saves that failed since one succeeded

    def save(self, step: int, engine: Engine, *, last_chance: bool) -> None:
        """Write a checkpoint; all ranks together.

        A first failure is said, and training goes on to the next save; a second in a row, or one where no later save
        comes (`last_chance`), raises ResourceError on all ranks. The checkpoint before stays as it is.
        """
        final = self.directory / f"{PREFIX}{step:08d}"
        partial = final.with_suffix(PARTIAL)
        fault = self._write(partial, step, engine)
        faults = [found for found in distributed.gather_objects(fault) if found]
        if not faults:
            with distributed.together("seal the checkpoint"):
                files = self._digests(partial)
                if distributed.rank() == 0:
                    self._seal(partial, final, step, files)
            self.failures = 0
            return
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self.failures += 1
        kept = f"the newest checkpoint is that of step {self.steps()[-1]}" if self.steps() else "there is no checkpoint yet"
        if last_chance or self.failures == FAILURES:
            raise ResourceError(f"step {step} could not be saved to {self.directory} ({faults[0]}; {kept}): free some space "
                                "and start again, training goes on from there")  # fmt: skip
        log.error("step %d could not be saved to %s (%s; %s): training goes on, the next save is the last chance",
                  step, self.directory, faults[0], kept)  # fmt: skip

    def _write(self, partial: Path, step: int, engine: Engine) -> str | None:
        """Write this rank's files. Returns what went wrong; what is not a matter of files is raised."""
        fault = None
        try:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            fault = _reason(error)
        if any(distributed.gather_objects(fault)):
            return fault
        try:
            engine.save(partial)
            if distributed.rank() == 0:
                write_json(partial / STATE, {"step": step, "ranks": distributed.world_size()})
        except (OSError, RuntimeError) as error:  # PoclError of write_json is a RuntimeError too
            fault = _reason(error)
        return fault

    def _seal(self, partial: Path, final: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        manifest = Manifest("checkpoint", self.fingerprint, files, {"step": step}, package_versions())
        with disk_faults(partial):
            write_json(partial / "manifest.json", asdict(manifest))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync_directory(self.directory)
            shutil.rmtree(self.directory / RESHARDED, ignore_errors=True)
            self._retire()

    def load(self, engine: Engine) -> int:
        """Put the newest whole checkpoint into the engine; all ranks together. Returns its step, 0 where there is none."""
        chosen = distributed.from_rank_zero(self._newest_whole() if distributed.rank() == 0 else None)
        if isinstance(chosen, str):
            raise ArtifactError(chosen)
        if chosen is None:
            return 0
        path, ranks = Path(chosen["path"]), int(chosen["ranks"])
        if ranks == distributed.world_size():
            engine.load(path)
        else:
            with distributed.together("convert the checkpoint"):
                if distributed.rank() == 0:
                    self._reshard(path, ranks, engine)
            engine.load(self.directory / RESHARDED, resharded=True)
        return int(chosen["step"])

    def _reshard(self, path: Path, ranks: int, engine: Engine) -> None:
        """Rewrite a checkpoint of another number of ranks. The original stays, so nothing is lost where this fails."""
        start = time.monotonic()
        log.info("checkpoint %s was written by %d ranks: converting it for %d", path, ranks, distributed.world_size())
        target = self.directory / RESHARDED
        with disk_faults(target):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            engine.reshard(path, target)
        log.info("converted in %.0f s", time.monotonic() - start)

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
            return {"path": str(path), "step": step, "ranks": read_json(path / STATE)["ranks"]}
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


def _reason(error: OSError | RuntimeError) -> str:
    """Why a file could not be written. Raises what is no matter of files."""
    if isinstance(error, OSError):
        return f"rank {distributed.rank()}: {error.strerror or error}"
    if isinstance(error, PoclError):
        return f"rank {distributed.rank()}: {error}"
    if any(words in str(error) for words in FULL_DISK):
        return f"rank {distributed.rank()}: no space left on the disk"
    raise error
