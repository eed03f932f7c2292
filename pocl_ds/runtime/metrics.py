"""Training metrics: metrics.jsonl, TensorBoard, and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from pocl_ds.errors import ResourceError
from pocl_ds.workflow.files import atomic_write, disk_is_full, explain_disk_errors


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

    def close(self) -> None:
        """Flush and close all files. An error of the disk was already raised by `write`."""
        for sink in filter(None, (self.stream, self.board)):
            with suppress(OSError):
                sink.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The records of one kind in a metrics.jsonl, without a half-written last line."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("kind") == kind:
            records.append(record)
    return records


def _drop_records_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as old, atomic_write(path) as new:
        for line in old:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a line that was cut short when the process was killed
                break
            # Step 0 writes its records again.
            if step and record["step"] <= step:
                new.write(line)


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
