"""Training checkpoints: complete or absent.

A checkpoint is built under a temporary name: every rank writes its files and computes their
digests, immediately or in the background. When all ranks are done the manifest is written, the
directory gets its final name, and only then are older checkpoints removed. A directory with a
final name is therefore always complete.

Random numbers, samples and schedules depend only on the step (see `curriculum.sampler` and
`seeding`), so the state is the engine's shards, one number, and the state of the policy and the
rollout worker.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocl_ds.config import CheckpointConfig
from pocl_ds.engines.protocol import Engine, WriteFiles
from pocl_ds.errors import ArtifactError, PoclError, ResourceError
from pocl_ds.runtime import distributed
from pocl_ds.training.checkpoint_files import (
    DAMAGED,
    PARTIAL,
    STATE,
    checkpoint_name,
    checkpoint_steps,
    readable_manifest,
    verify_checkpoint,
)
from pocl_ds.workflow.files import (
    disk_is_full,
    explain_disk_errors,
    file_digest,
    fsync_path,
    read_json,
    write_json,
)
from pocl_ds.workflow.manifest import MANIFEST, Manifest, package_versions, save_manifest

log = logging.getLogger("pocl_ds")

# A checkpoint of another number of ranks, converted; the next save removes it.
RESHARDED = "resharded"
MAX_FAILURES = 2  # failed saves in a row that stop a run


@dataclass
class _Save:
    """One checkpoint in progress: the files that this rank has written, or its error."""

    step: int
    partial: Path
    validation_loss: float | None
    policy_state: dict[str, Any] = field(default_factory=dict)
    write_extra_files: Callable[[Path], list[Path]] | None = None  # rank 0 calls it
    thread: threading.Thread | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    disk_error: str | None = None  # the disk is full or missing: the next save may succeed
    other_error: Exception | None = None


class Checkpoints:
    """The checkpoints of one training directory. All ranks call every method together.

    dtype: of the student's forward pass. With student.dtype=auto it depends on the machine, not on
    the fingerprint, and a training that changes it in the middle is refused.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        fingerprint: str,
        dtype: str = "float32",
    ) -> None:
        self.directory, self.config, self.fingerprint = directory, config, fingerprint
        self.dtype = dtype
        self.failures = 0  # failed saves since the last one that succeeded
        self._async_save: _Save | None = None  # the same on all ranks

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing in the background."""
        save = self._async_save
        return save is not None and save.thread is not None and save.thread.is_alive()

    def save(
        self,
        step: int,
        engine: Engine,
        *,
        is_final: bool,
        validation_loss: float | None = None,
        policy_state: dict[str, Any] | None = None,
        write_extra_files: Callable[[Path], list[Path]] | None = None,
    ) -> None:
        """Write a checkpoint, or with async_save start writing it in the background.

        write_extra_files: writes further files into the checkpoint, on rank 0, and returns them.
        is_final: no later save follows, so this one is not written in the background.

        After a first failure the run logs an error and continues to the next save. A second failure
        in a row, or a failure of the final save, raises ResourceError on all ranks. The previous
        checkpoint stays in either case.
        """
        self.finalize_async_save()
        partial = self.step_directory(step).with_suffix(PARTIAL)
        save = _Save(step, partial, validation_loss, policy_state or {}, write_extra_files)
        save.disk_error = self._make_directory(partial)
        if any(distributed.gather_objects(save.disk_error)):
            self._complete(save, is_final=is_final)
            return
        in_background = self.config.async_save and not is_final
        write_files = engine.snapshot(partial, copy=in_background)
        if not in_background:
            self._write(save, write_files)
            self._complete(save, is_final=is_final)
            return
        save.thread = threading.Thread(
            target=self._write, args=(save, write_files), name="checkpoint"
        )
        save.thread.start()
        self._async_save = save

    def finalize_async_save(self) -> None:
        """Wait for a save in the background and complete it. Does nothing if there is none."""
        if self._async_save is not None and self._async_save.thread is not None:
            self._async_save.thread.join()
            save, self._async_save = self._async_save, None
            self._complete(save, is_final=False)

    def load(self, engine: Engine) -> tuple[int, dict[str, Any]]:
        """Load the newest intact checkpoint into the engine. Returns its step (0 if there is none)
        and the policy's state.

        Raises ArtifactError if there are checkpoints, but none that can be used.
        """
        newest = distributed.broadcast_object(
            self._newest_intact() if distributed.rank() == 0 else None
        )
        if isinstance(newest, str):
            raise ArtifactError(newest)
        if newest is None:
            return 0, {}
        path, ranks = Path(newest["path"]), int(newest["ranks"])
        if ranks == distributed.world_size():
            engine.load(path)
        else:
            with distributed.raise_on_all_ranks("convert the checkpoint"):
                if distributed.rank() == 0:
                    self._reshard(path, ranks, engine)
            engine.load(self.directory / RESHARDED, resharded=True)
        return int(newest["step"]), dict(newest["policy"])

    def step_directory(self, step: int) -> Path:
        """The directory of the checkpoint of a step."""
        return self.directory / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return checkpoint_steps(self.directory)

    def _make_directory(self, partial: Path) -> str | None:
        """Make an empty directory; returns why that failed."""
        try:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            return _disk_error(error)
        return None

    def _write(self, save: _Save, write_files: WriteFiles) -> None:
        """Write this rank's files and compute their digests. Errors are recorded for `_complete`,
        because this may run in a thread.
        """
        try:
            paths = write_files()
            if distributed.rank() == 0:
                state = {
                    "step": save.step,
                    "ranks": distributed.world_size(),
                    "policy": save.policy_state,
                    "dtype": self.dtype,
                }
                write_json(save.partial / STATE, state)
                paths = [*paths, save.partial / STATE]
                if save.write_extra_files:
                    paths += save.write_extra_files(save.partial)
            # If the manifest survived a crash and the files did not, intact checkpoints would be
            # removed in favor of a broken one.
            for path in {*paths, *(path.parent for path in paths)}:
                fsync_path(path)
            save.files = {str(path.relative_to(save.partial)): file_digest(path) for path in paths}
        except (OSError, RuntimeError) as error:  # PoclError is a RuntimeError
            save.disk_error = _disk_error(error)
            save.other_error = None if save.disk_error else error
        except Exception as error:
            save.other_error = error

    def _complete(self, save: _Save, *, is_final: bool) -> None:
        """Complete the checkpoint that all ranks have written, or report that it failed."""
        if save.other_error is not None:
            raise save.other_error
        # Rank 0 writes the manifest with the files of all ranks, if none of them failed.
        gathered = distributed.gather_objects((save.disk_error, save.files))
        error = next((rank_error for rank_error, _ in gathered if rank_error), None)
        if error is None:
            files = {name: digest for _, files in gathered for name, digest in files.items()}
            error = distributed.broadcast_object(
                self._publish(save, files) if distributed.rank() == 0 else None
            )
        if error is None:
            self.failures = 0
            return
        # Report the failure; the second in a row stops the run.
        if distributed.rank() == 0:
            shutil.rmtree(save.partial, ignore_errors=True)
        self.failures += 1
        newest = "there is no checkpoint yet"
        if steps := self.steps():
            newest = f"the newest checkpoint is that of step {steps[-1]}"
        if is_final or self.failures == MAX_FAILURES:
            raise ResourceError(
                f"step {save.step} could not be saved to {self.directory} ({error}; {newest}): "
                f"free some space and start again, training resumes from there"
            )
        log.error(
            "step %d could not be saved to %s (%s; %s): training continues, and stops if the next "
            "save fails too",
            save.step,
            self.directory,
            error,
            newest,
        )

    def _publish(self, save: _Save, files: dict[str, dict[str, Any]]) -> str | None:
        """Give a checkpoint its manifest and final name, and remove older ones. Returns why that
        failed.
        """
        info: dict[str, Any] = {"step": save.step}
        if save.validation_loss is not None:
            info["validation_loss"] = save.validation_loss
        manifest = Manifest("checkpoint", self.fingerprint, files, info, package_versions())
        final = save.partial.with_suffix("")
        try:
            save_manifest(save.partial / MANIFEST, manifest)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(save.partial, final)
            fsync_path(self.directory)
        except (OSError, PoclError) as error:
            return _disk_error(error)
        shutil.rmtree(self.directory / RESHARDED, ignore_errors=True)
        self._remove_old()
        return None

    def _reshard(self, path: Path, ranks: int, engine: Engine) -> None:
        """Convert a checkpoint of another number of ranks. The original stays, so nothing is lost
        if this fails.
        """
        start = time.monotonic()
        log.info(
            "checkpoint %s was written by %d ranks: converting it for %d",
            path,
            ranks,
            distributed.world_size(),
        )
        target = self.directory / RESHARDED
        with explain_disk_errors(target):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            engine.reshard(path, target)
        log.info("converted in %.0f s", time.monotonic() - start)

    def _newest_intact(self) -> dict[str, Any] | str | None:
        """Path, step, ranks and policy state of the newest verified checkpoint; a message if none
        can be used; None if there is none.
        """
        for step in checkpoint_steps(self.directory, PARTIAL):
            leftover = self.step_directory(step).with_suffix(PARTIAL)
            log.info("removing %s, an incomplete checkpoint of an interrupted save", leftover)
            shutil.rmtree(leftover, ignore_errors=True)
        # The newest checkpoint whose files are intact; damaged ones are skipped.
        steps, damaged, problem = self.steps(), list[Path](), ""
        for step in reversed(steps):
            # Verify the files of the checkpoint against its manifest.
            path = self.step_directory(step)
            manifest, faults = verify_checkpoint(path)
            if faults or manifest is None:
                fault = "; ".join(faults[:3])
                problem = problem or fault
                log.warning("checkpoint %s is damaged (%s): trying the previous one", path, fault)
                damaged.append(path)
                continue
            if manifest.fingerprint != self.fingerprint:
                return (
                    f"checkpoint {path} belongs to another recipe or other data: use another "
                    f"--run-dir"
                )
            state = read_json(path / STATE)
            if state["dtype"] != self.dtype:
                return (
                    f"checkpoint {path} was trained in {state['dtype']}, and this machine trains "
                    f"in {self.dtype} (student.dtype=auto): continue on a machine like the first "
                    "one, or use another --run-dir"
                )
            self._rename_damaged(damaged, resumed=step, lost=steps[-1] - step)
            return {"path": str(path), **{key: state[key] for key in ("step", "ranks", "policy")}}
        if steps:
            return (
                f"none of the checkpoints in {self.directory} is intact (the newest: {problem}): "
                "restore one, or remove that directory to train from the start"
            )
        return None

    def _rename_damaged(self, damaged: list[Path], *, resumed: int, lost: int) -> None:
        """Rename damaged checkpoints. If they counted as the newest, intact ones would be removed
        in their favor.
        """
        for path in damaged:
            renamed = path.with_suffix(DAMAGED)
            shutil.rmtree(renamed, ignore_errors=True)
            with explain_disk_errors(path):
                path.rename(renamed)
        if damaged:
            log.warning(
                "resuming from step %d, %d steps run again; the damaged files stay as *%s until "
                "the next save",
                resumed,
                lost,
                DAMAGED,
            )

    def _remove_old(self) -> None:
        """Remove checkpoints that keep_last, keep_every_n_steps and keep_best do not keep."""
        for step in checkpoint_steps(self.directory, DAMAGED):
            shutil.rmtree(self.step_directory(step).with_suffix(DAMAGED), ignore_errors=True)
        steps, config = self.steps(), self.config
        retained = set(steps[-config.keep_last :])
        if config.keep_every_n_steps:
            retained |= {step for step in steps if step % config.keep_every_n_steps == 0}
        if config.keep_best:
            losses = {}
            for step in steps:
                manifest = readable_manifest(self.step_directory(step))
                if manifest and "validation_loss" in manifest.info:
                    losses[step] = manifest.info["validation_loss"]
            if losses:
                retained.add(min(losses, key=lambda step: losses[step]))
        for step in set(steps) - retained:
            shutil.rmtree(self.step_directory(step), ignore_errors=True)


def _disk_error(error: Exception) -> str | None:
    """Why a file could not be written; None for errors that have nothing to do with files."""
    if isinstance(error, OSError):
        return f"rank {distributed.rank()}: {error.strerror or error}"
    if isinstance(error, PoclError):
        return f"rank {distributed.rank()}: {error}"
    if disk_is_full(error):
        return f"rank {distributed.rank()}: no space left on the disk"
    return None
