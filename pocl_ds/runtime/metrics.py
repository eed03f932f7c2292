"""Training metrics: metrics.jsonl, TensorBoard, and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from pocl_ds.errors import ResourceError
from pocl_ds.workflow.files import (
    atomic_write,
    disk_is_full,
    explain_disk_errors,
    fsync_path,
)

log = logging.getLogger("pocl_ds")

STEP_KINDS = ("step", "skipped")  # kinds of records of which each optimizer step has one


class MetricsWriter:
    """The training metrics of rank 0: metrics.jsonl always, TensorBoard and Weights & Biases on
    request.

    step: optimizer step that training resumes from. Records after it, or all records if it is 0,
    are dropped first, so that the files describe one uninterrupted run.
    """

    def __init__(
        self,
        directory: Path,
        *,
        step: int,
        tensorboard: bool,
        wandb: bool,
        wandb_project: str,
        name: str,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        self.tensorboard_path = directory / "tensorboard"
        _drop_records_after(self.path, step)
        with explain_disk_errors(self.path):
            self.stream: TextIO = self.path.open("a", encoding="utf-8")
            fsync_path(directory)
        with explain_disk_errors(self.tensorboard_path):
            self.board = _open_tensorboard(self.tensorboard_path, step) if tensorboard else None
        self.wandb = _open_wandb(directory, wandb_project, name) if wandb else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record with `kind`, `step` and any metrics. Only numbers go to the trackers."""
        with explain_disk_errors(self.path):
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()
        numbers = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        if self.board:
            with explain_disk_errors(self.tensorboard_path):
                for name, value in numbers.items():
                    self.board.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.log(numbers, step=record["step"])

    def sync(self) -> None:
        """Bring all records to the disk: those up to a checkpoint are never written again."""
        with explain_disk_errors(self.path):
            os.fsync(self.stream.fileno())

    def close(self) -> None:
        """Flush and close all files. An error of the disk was already raised by `write`."""
        for sink in filter(None, (self.stream, self.board)):
            with suppress(OSError):
                sink.close()
        if self.wandb:
            self.wandb.finish()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, without lines that are damaged or half-written."""
    with path.open("rb") as stream:
        for _, record in _parse(stream):
            if record is not None:
                yield record


def read_metrics(path: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The records of one kind in a metrics.jsonl, without damaged lines."""
    return [record for record in read_records(path) if record.get("kind") == kind]


def missing_steps(records: Iterable[Mapping[str, Any]], last: int | None = None) -> list[int]:
    """The optimizer steps without a record, up to the step `last`, by default the last recorded
    one.
    """
    recorded = {record["step"] for record in records if record.get("kind") in STEP_KINDS}
    last = max(recorded, default=0) if last is None else last
    return [step for step in range(1, last + 1) if step not in recorded]


def format_steps(steps: Sequence[int]) -> str:
    """Ascending numbers as ranges: `3 to 9, 12`."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in ranges)


def _parse(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its record; None for a line that is damaged: not UTF-8, no JSON, or of no
    step.
    """
    for line in lines:
        try:
            record = json.loads(line)
            yield line, record if isinstance(record["step"], int) else None
        except (ValueError, TypeError, KeyError, RecursionError):
            yield line, None


def _drop_records_after(path: Path, step: int) -> None:
    """Drop the records of steps that run again, and lines that cannot be read. Says what is missing
    of the others: a disk that lost power may have lost them.
    """
    if not path.is_file():
        return
    retained, damaged = [], []
    with path.open("rb") as old, atomic_write(path, "wb") as new:
        for number, (line, record) in enumerate(_parse(old), 1):
            if record is None:
                # The last line of a killed process is cut short.
                damaged += [number] if line.endswith(b"\n") else []
            elif step and record["step"] <= step:  # step 0 writes its records again
                new.write(line if line.endswith(b"\n") else line + b"\n")
                retained.append(record)
    if damaged:
        log.warning("%s: line %s cannot be read and is dropped", path, format_steps(damaged))
    if missing := missing_steps(retained, step):
        log.warning(
            "%s lacks the records of %d of %d optimizer steps (%s): the weights are those of step "
            "%d all the same, but the curves have a gap",
            path,
            len(missing),
            step,
            format_steps(missing),
            step,
        )


def _open_tensorboard(directory: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # The next `add_scalar` raises the error of a full disk again, and reports it in one sentence.
    # Without this hook Python would also print the traceback of TensorBoard's thread.
    threading.excepthook = partial(_ignore_full_disk, threading.excepthook)
    return SummaryWriter(str(directory), purge_step=step + 1 if step else 0)


def _ignore_full_disk(
    excepthook: Callable[[threading.ExceptHookArgs], object], arguments: threading.ExceptHookArgs
) -> None:
    if arguments.exc_value is None or not disk_is_full(arguments.exc_value):
        excepthook(arguments)


def check_wandb() -> None:
    """Raise ResourceError if the package wandb is missing, before hours of work."""
    if importlib.util.find_spec("wandb") is None:
        raise ResourceError(
            "train.tracking.wandb=true needs the package wandb: pip install wandb, or set it to "
            "false"
        )


def _open_wandb(directory: Path, project: str, name: str) -> Any:
    check_wandb()
    import wandb

    # One identity over all restarts of the run.
    identity = directory / "wandb_id"
    if not identity.is_file():
        with atomic_write(identity) as stream:
            stream.write(secrets.token_hex(8))
    try:
        return wandb.init(
            project=project,
            name=name,
            id=identity.read_text().strip(),
            resume="allow",
            dir=str(directory),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise ResourceError(
            f"train.tracking.wandb=true, but Weights & Biases refuses ({reason}): export "
            "WANDB_API_KEY, or WANDB_MODE=offline, or set it to false"
        ) from None
