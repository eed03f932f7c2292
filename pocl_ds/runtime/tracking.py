"""What a run says while it works: log lines and progress for people, metrics for programs.

Rank 0 speaks; another rank speaks only through warnings and errors, with its number.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from pocl_ds.errors import ResourceError
from pocl_ds.runtime.credentials import hide
from pocl_ds.workflow.files import atomic_write, disk_is_full, explain_disk_errors

log = logging.getLogger("pocl_ds")

# A terminal is redrawn often; a log file gets a line now and then.
TERMINAL_INTERVAL, FILE_INTERVAL = 0.2, 10.0


class _Formatter(logging.Formatter):
    """Lines without secrets: what a library's error says may hold an address with a password, or a
    header with a token.
    """

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class _Terminal(logging.StreamHandler):
    """Lines on stderr. One that cannot be written, to a terminal that is gone or a log on a full
    disk, ends no run.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _File(logging.FileHandler):
    """Lines in a file. Where they cannot be written the terminal hears of it, once."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        fault = sys.exc_info()[1]
        if not isinstance(fault, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            log.warning(
                "%s cannot be written (%s): lines are lacking there from here on",
                self.baseFilename,
                fault.strerror,
            )


def setup_logging(rank: int = 0, *, world_size: int = 1) -> None:
    """Send the package's log to stderr: rank 0 in full, the others' warnings with their number."""
    handler = _Terminal(sys.stderr)
    mark = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler.setFormatter(_Formatter(f"%(asctime)s {mark}%(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def keep_log(path: Path) -> None:
    """Write what the log says to a file too, behind what is there: `pocl watch` reads it. Progress
    comes now and then.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _File(path, encoding="utf-8")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)


class Progress:
    """Rate, time left and facts of long work, on one redrawn line of a terminal or as lines of a
    log.

    A context manager: `with Progress(total, "samples", "score") as progress: progress.advance(64,
    rouge=0.1)`.
    """

    def __init__(
        self, total: int, unit: str, label: str, *, done: int = 0, silent: bool = False
    ) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done, self.first, self.said = done, done, done  # said: what the newest line told
        self.silent = silent or log.level > logging.INFO
        self.terminal = sys.stderr.isatty()
        self.start = self.shown = self.kept = time.monotonic()
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1, **facts: Any) -> None:
        """Count finished work and show it when it is time."""
        self.done += count
        self.facts = facts
        now = time.monotonic()
        if now - self.shown >= (TERMINAL_INTERVAL if self.terminal else FILE_INTERVAL):
            self._show()

    def close(self) -> None:
        """Show the last state."""
        if self.done > self.first:
            if self.terminal or self.done > self.said:
                self._show()
            if self.terminal and not self.silent:
                with suppress(OSError):
                    sys.stderr.write("\n")

    @property
    def rate(self) -> float:
        """Units a second since the start of this process's part."""
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def _show(self) -> None:
        self.shown, self.said = time.monotonic(), self.done
        if self.silent:
            return
        rate = self.rate
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        facts = "".join(f"  {name} {_short(value)}" for name, value in self.facts.items())
        per = (
            f"{rate:.2f} {self.unit}/s"
            if rate >= 0.1
            else f"{1 / max(rate, 1e-9):.1f} s/{self.unit.removesuffix('s')}"
        )
        line = (
            f"{self.label}  {self.done}/{self.total} {self.unit}  {per}  ETA {clock(left)}{facts}"
        )
        if self.terminal:
            with suppress(OSError):  # a terminal that is gone ends no run
                width = os.get_terminal_size(sys.stderr.fileno()).columns
                sys.stderr.write("\r\x1b[K" + line[: width - 1])
                sys.stderr.flush()
            if self.shown - self.kept >= FILE_INTERVAL or self.done == self.total:
                self.kept = self.shown
                for handler in log.handlers:
                    if isinstance(handler, logging.FileHandler):
                        handler.emit(
                            log.makeRecord(log.name, logging.INFO, __file__, 0, "%s", (line,), None)
                        )
        else:
            log.info("%s", line)


class Spikes:
    """Tells a loss that jumps from one that wanders: far above the median of the last ones in its
    stage.
    """

    WINDOW, FEWEST, DEVIATIONS, SHARE = 32, 12, 8.0, 0.2

    def __init__(self) -> None:
        self._stage: int | None = None
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def seen(self, loss: float, stage: int) -> float | None:
        """How many times its recent median a spiking loss is; None for one that is no spike."""
        if stage != self._stage:
            self._stage = stage
            self._recent.clear()
        ratio = None
        if len(self._recent) >= self.FEWEST:
            middle = median(self._recent)
            spread = 1.4826 * median(
                abs(value - middle) for value in self._recent
            )  # a normal distribution's deviation
            if loss > middle + max(self.DEVIATIONS * spread, self.SHARE * middle):
                ratio = loss / middle
        self._recent.append(loss)
        return ratio


class MetricsWriter:
    """Training metrics of rank 0: metrics.jsonl always, TensorBoard and Weights & Biases where
    asked.

    On resume everything after the checkpoint's step is dropped first, so that the files tell of one
    run, not of two that overlap; from step 0 everything.
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
        _drop_after(self.path, step)
        with explain_disk_errors(self.path):
            self.stream: TextIO = self.path.open("a", encoding="utf-8")
        with explain_disk_errors(directory / "tensorboard"):
            self.board = _tensorboard(directory / "tensorboard", step) if tensorboard else None
        self.wandb = _wandb(directory, wandb_project, name) if wandb else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record; it holds `kind` and `step`."""
        with explain_disk_errors(self.path):
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        if self.board:
            with explain_disk_errors(self.path.with_name("tensorboard")):
                for key, value in numbers.items():
                    self.board.add_scalar(f"{record['kind']}/{key}", value, record["step"])
        if self.wandb:
            self.wandb.log(
                {f"{record['kind']}/{key}": value for key, value in numbers.items()},
                step=record["step"],
            )

    def close(self) -> None:
        """Flush and close every sink. What cannot be written any more was told when it was written."""
        for sink in filter(None, (self.stream, self.board)):
            with suppress(OSError):
                sink.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The records of one kind in a metrics.jsonl; a half-written last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("kind") == kind:
            records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as old, atomic_write(path) as new:
        for line in old:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut short
                break
            if step and record["step"] <= step:  # what stands at step 0 is said anew there
                new.write(line)


def _tensorboard(directory: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = partial(
        _unless_full, threading.excepthook
    )  # its thread hands its error on to whoever writes next
    return SummaryWriter(str(directory), purge_step=step + 1 if step else 0)


def _unless_full(
    others: Callable[[threading.ExceptHookArgs], object], fault: threading.ExceptHookArgs
) -> None:
    if fault.exc_value is None or not disk_is_full(fault.exc_value):
        others(fault)


def check_wandb() -> None:
    """Raise ResourceError where Weights & Biases cannot be logged to: before hours of scoring, not
    after.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ResourceError(
            "train.tracking.wandb=true needs the package wandb: pip install wandb, or set it to "
            "false"
        )


def _wandb(directory: Path, project: str, name: str) -> Any:
    check_wandb()
    import wandb

    identity = directory / "wandb_id"  # one tracker identity over every restart of the run
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
            f"train.tracking.wandb=true, and Weights & Biases refuses ({reason}): export "
            f"WANDB_API_KEY, or "
            "WANDB_MODE=offline, or set it to false"
        ) from None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """Seconds as a clock shows them, 1:02:03; `?` where there is no end."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def aligned(
    rows: Sequence[Sequence[str]], *, numbers: bool = False, rule: bool = False
) -> list[str]:
    """Rows of a table as lines, their columns to the left, or with `numbers` all but the first to
    the right.

    rule: with a line of dashes below the first row.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    whole = [rows[0], ["-" * width for width in widths], *rows[1:]] if rule else rows
    return [
        "  ".join(
            cell.rjust(width) if numbers and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in whole
    ]
