"""Checkpoints of a training: whole or not at all.

A checkpoint is built under a temporary name: every rank writes its files and digests them, at once
or in the background. When all are done the manifest is written, the directory gets its name, and
only then do older ones go. A name without a suffix is therefore always a whole one. What a rank's
random numbers, samples and schedules are follows from the step alone (see `curriculum.sampler`,
`engine.seed_step`), so the state is the engine's shards, one number, and what policy and writer
have to remember.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pocl_ds.config import CheckpointConfig
from pocl_ds.engines.engine import Engine, Write
from pocl_ds.errors import ArtifactError, PoclError, ResourceError
from pocl_ds.runtime import distributed
from pocl_ds.workflow.run_dir import (
    MANIFEST,
    Manifest,
    damaged_files,
    disk_faults,
    disk_is_full,
    file_digest,
    package_versions,
    read_json,
    read_manifest,
    sync,
    write_json,
)

log = logging.getLogger("pocl_ds")

PREFIX, PARTIAL, DAMAGED, STATE = "step-", ".partial", ".damaged", "trainer.json"
RESHARDED = (
    "resharded"  # a checkpoint of another number of ranks, rewritten; gone with the next save
)
FAILURES = 2  # failed saves in a row that end a run


@dataclass
class _Save:
    """One checkpoint on its way: what this rank has written of it, or why it could not."""

    step: int
    partial: Path
    validation_loss: float | None
    remembered: dict[str, Any] = field(default_factory=dict)  # by the policy
    more: Callable[[Path], list[Path]] | None = None  # of rank 0
    thread: threading.Thread | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault: str | None = None
    defect: Exception | None = None  # what is no matter of files


class Checkpoints:
    """The checkpoints of one training directory."""

    def __init__(self, directory: Path, config: CheckpointConfig, *, fingerprint: str) -> None:
        self.directory, self.config, self.fingerprint = directory, config, fingerprint
        self.failures = 0  # saves that failed since one succeeded
        self.underway: _Save | None = None  # the same on all ranks

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing in the background."""
        return (
            self.underway is not None
            and self.underway.thread is not None
            and self.underway.thread.is_alive()
        )

    def save(
        self,
        step: int,
        engine: Engine,
        *,
        last_chance: bool,
        validation_loss: float | None = None,
        remembered: dict[str, Any] | None = None,
        more: Callable[[Path], list[Path]] | None = None,
    ) -> None:
        """Write a checkpoint, or begin to where it is done in the background; all ranks together.
        more: writes further files into its folder, on rank 0, and says which.

        A first failure is said, and training goes on to the next save; a second in a row, or one
        where no later save comes (`last_chance`), raises ResourceError on all ranks. The checkpoint
        before stays as it is.
        """
        self.settle()
        save = _Save(
            step, self.folder(step).with_suffix(PARTIAL), validation_loss, remembered or {}, more
        )
        save.fault = self._clear(save.partial)
        if any(distributed.gather_objects(save.fault)):
            self._end(save, last_chance=last_chance)
            return
        background = self.config.async_save and not last_chance
        write = engine.snapshot(save.partial, copy=background)
        if not background:
            self._write(save, write)
            self._end(save, last_chance=last_chance)
            return
        save.thread = threading.Thread(target=self._write, args=(save, write), name="checkpoint")
        save.thread.start()
        self.underway = save

    def settle(self) -> None:
        """Wait for a save in the background, and seal it; all ranks together. Does nothing where
        there is none.
        """
        if self.underway is not None and self.underway.thread is not None:
            self.underway.thread.join()
            save, self.underway = self.underway, None
            self._end(save, last_chance=False)

    def _clear(self, partial: Path) -> str | None:
        try:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            return _reason(error)
        return None

    def _write(self, save: _Save, write: Write) -> None:
        """Write and digest this rank's files; what goes wrong is kept for `_end`, since this may be
        a thread.
        """
        try:
            paths = write()
            if distributed.rank() == 0:
                state = {
                    "step": save.step,
                    "ranks": distributed.world_size(),
                    "policy": save.remembered,
                }
                write_json(save.partial / STATE, state)
                paths = [
                    *paths,
                    save.partial / STATE,
                    *(save.more(save.partial) if save.more else []),
                ]
            for path in {*paths, *(path.parent for path in paths)}:
                sync(path)  # a manifest that outlives its files would push whole checkpoints out
            save.files = {str(path.relative_to(save.partial)): file_digest(path) for path in paths}
        except (OSError, RuntimeError) as error:  # PoclError of write_json is a RuntimeError too
            save.fault = _reason(error)
            save.defect = None if save.fault else error
        except Exception as error:
            save.defect = error

    def _end(self, save: _Save, *, last_chance: bool) -> None:
        """Seal what all ranks have written, or say that it could not be."""
        if save.defect is not None:
            raise save.defect
        gathered = distributed.gather_objects((save.fault, save.files))
        faults = [fault for fault, _ in gathered if fault]
        if not faults:
            files = {name: digest for _, files in gathered for name, digest in files.items()}
            fault = distributed.from_rank_zero(
                self._seal(save, files) if distributed.rank() == 0 else None
            )
            if fault is None:
                self.failures = 0
                return
            faults = [fault]
        if distributed.rank() == 0:
            shutil.rmtree(save.partial, ignore_errors=True)
        self.failures += 1
        kept = (
            f"the newest checkpoint is that of step {self.steps()[-1]}"
            if self.steps()
            else "there is no checkpoint yet"
        )
        if last_chance or self.failures == FAILURES:
            raise ResourceError(
                f"step {save.step} could not be saved to {self.directory} ({faults[0]}; {kept}): "
                f"free some space "
                "and start again, training goes on from there"
            )
        log.error(
            "step %d could not be saved to %s (%s; %s): training goes on, the next save is the "
            "last chance",
            save.step,
            self.directory,
            faults[0],
            kept,
        )

    def _seal(self, save: _Save, files: dict[str, dict[str, Any]]) -> str | None:
        """Give a checkpoint its manifest and its name, and take older ones away. Returns why that
        could not be done.
        """
        info = {"step": save.step} | (
            {} if save.validation_loss is None else {"validation_loss": save.validation_loss}
        )
        manifest = Manifest("checkpoint", self.fingerprint, files, info, package_versions())
        final = save.partial.with_suffix("")
        try:
            write_json(save.partial / MANIFEST, asdict(manifest))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(save.partial, final)
            sync(self.directory)
        except (OSError, PoclError) as error:
            return _reason(error)
        shutil.rmtree(self.directory / RESHARDED, ignore_errors=True)
        self._retire()
        return None

    def load(self, engine: Engine) -> tuple[int, dict[str, Any]]:
        """Put the newest whole checkpoint into the engine; all ranks together. Returns its step, 0
        where there is none, and what the policy had to remember.
        """
        chosen = distributed.from_rank_zero(
            self._newest_whole() if distributed.rank() == 0 else None
        )
        if isinstance(chosen, str):
            raise ArtifactError(chosen)
        if chosen is None:
            return 0, {}
        path, ranks = Path(chosen["path"]), int(chosen["ranks"])
        if ranks == distributed.world_size():
            engine.load(path)
        else:
            with distributed.together("convert the checkpoint"):
                if distributed.rank() == 0:
                    self._reshard(path, ranks, engine)
            engine.load(self.directory / RESHARDED, resharded=True)
        return int(chosen["step"]), dict(chosen["policy"])

    def _reshard(self, path: Path, ranks: int, engine: Engine) -> None:
        """Rewrite a checkpoint of another number of ranks. The original stays, so nothing is lost
        where this fails.
        """
        start = time.monotonic()
        log.info(
            "checkpoint %s was written by %d ranks: converting it for %d",
            path,
            ranks,
            distributed.world_size(),
        )
        target = self.directory / RESHARDED
        with disk_faults(target):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            engine.reshard(path, target)
        log.info("converted in %.0f s", time.monotonic() - start)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / f"{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints with a final name, oldest first."""
        names = (p.name for p in self.directory.glob(f"{PREFIX}*") if p.is_dir() and not p.suffix)
        return sorted(int(name.removeprefix(PREFIX)) for name in names)

    def _newest_whole(self) -> dict[str, Any] | str | None:
        """{"path", "step"} of the newest verified checkpoint; a sentence where it cannot be used;
        None where none is.
        """
        for leftover in self.directory.glob(f"*{PARTIAL}"):
            log.info("removing %s, the remains of a save that was cut short", leftover)
            shutil.rmtree(leftover, ignore_errors=True)
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            path = self.folder(step)
            try:
                manifest = _manifest(path)
                faults = (
                    ["manifest.json is missing or damaged"]
                    if manifest is None
                    else damaged_files(path, manifest)
                )
            except OSError as error:
                manifest, faults = None, [f"it cannot be read ({error.strerror})"]
            if faults or manifest is None:
                log.warning(
                    "checkpoint %s is damaged (%s): looking for the one before",
                    path,
                    "; ".join(faults),
                )
                damaged.append(path)
                continue
            if manifest.fingerprint != self.fingerprint:
                return f"checkpoint {path} belongs to another recipe or other data: use another --run-dir"
            self._set_aside(damaged, step, steps[-1] - step)
            state = read_json(path / STATE)
            return {
                "path": str(path),
                "step": step,
                "ranks": state["ranks"],
                "policy": state["policy"],
            }
        if steps:
            return f"none of the checkpoints in {self.directory} is whole: remove that directory to train from the start"
        return None

    def _set_aside(self, damaged: list[Path], step: int, lost: int) -> None:
        """Take the name of a checkpoint from damaged ones: counted as newest, they would push whole
        ones out.
        """
        for path in damaged:
            aside = path.with_suffix(DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            with disk_faults(path):
                path.rename(aside)
        if damaged:
            log.warning(
                "going on from step %d, %d steps are trained again; the damaged files stay as *%s "
                "until the next save",
                step,
                lost,
                DAMAGED,
            )

    def _retire(self) -> None:
        """Remove what neither `keep`, `keep_every_n_steps` nor `keep_best` holds."""
        for aside in self.directory.glob(f"*{DAMAGED}"):
            shutil.rmtree(aside, ignore_errors=True)
        steps, config = self.steps(), self.config
        kept = set(steps[-config.keep_last :])
        if config.keep_every_n_steps:
            kept |= {step for step in steps if step % config.keep_every_n_steps == 0}
        if config.keep_best:
            manifests = {step: _manifest(self.folder(step)) for step in steps}
            losses = {
                step: found.info["validation_loss"]
                for step, found in manifests.items()
                if found and "validation_loss" in found.info
            }
            kept |= {min(losses, key=lambda step: losses[step])} if losses else set()
        for step in set(steps) - kept:
            shutil.rmtree(self.folder(step), ignore_errors=True)


def _manifest(path: Path) -> Manifest | None:
    """A checkpoint's manifest, None where it is missing or no JSON. Raises ArtifactError for one of
    another program or schema.
    """
    try:
        read_json(path / MANIFEST)
    except ArtifactError:
        return None
    return read_manifest(path)


def _reason(error: Exception) -> str | None:
    """Why a file could not be written; None for what is no matter of files."""
    if isinstance(error, OSError):
        return f"rank {distributed.rank()}: {error.strerror or error}"
    if isinstance(error, PoclError):
        return f"rank {distributed.rank()}: {error}"
    if disk_is_full(error):
        return f"rank {distributed.rank()}: no space left on the disk"
    return None
