"""Progress of long work: bars in a terminal, lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pocl_ds.runtime.formatting import format_duration, format_value
from pocl_ds.runtime.logs import log, log_to_files_only

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

# Seconds between two updates of a bar, and between two lines in a log.
TERMINAL_INTERVAL, LOG_INTERVAL = 0.2, 10.0


class Progress:
    """Number of finished units, rate, time left and metrics of long work.

    In a terminal it is a bar, else a line in the log at least every 10 seconds; log files get the
    line in either case. It is a context manager:

        with Progress(total, "samples", "score") as progress:
            progress.advance(64, rouge=0.1)

    Args:
        total: number of units, for example of samples; None if it is unknown.
        unit: name of the units in the plural.
        label: name of the work, for example the workflow step.
        done: units that were finished before, for example in an earlier attempt.
        silent: show nothing. Ranks that log only warnings are always silent.
        min_seconds: show nothing until the work has taken this long.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        label: str,
        *,
        done: int = 0,
        silent: bool = False,
        min_seconds: float = 0.0,
    ) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done, self.initially_done, self.shown_done = done, done, done
        self.silent = silent or log.level > logging.INFO
        self.start = self.last_shown = self.last_logged = time.monotonic()
        self.metrics: dict[str, Any] = {}
        self.min_seconds = min_seconds
        self._bar: _Bar | None = None
        self._bar_pending = not self.silent
        self._open_bar()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1, **metrics: Any) -> None:
        """Add finished units, and show progress unless it was shown within the interval.

        metrics: newest values to show, for example the loss.
        """
        self.done += count
        self.metrics = metrics
        self._open_bar()
        interval = TERMINAL_INTERVAL if self._bar else LOG_INTERVAL
        if time.monotonic() - self.last_shown >= interval:
            self._show()

    def close(self) -> None:
        """Show the final state."""
        if time.monotonic() - self.start < self.min_seconds:
            return
        if self.done > self.shown_done or (self._bar and self.done > self.initially_done):
            self._show()
        if self._bar:
            self._bar.close(self.line() if self.done > self.initially_done else None)
            self._bar = None

    @property
    def rate(self) -> float:
        """Units per second since this object was created."""
        return (self.done - self.initially_done) / max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        """The state as one line: `score  64/256 samples  12.00 samples/s  ETA 16 s  rouge 0.1`."""
        rate = self.rate
        metrics = "".join(f"  {name} {format_value(value)}" for name, value in self.metrics.items())
        speed = f"{rate:.2f} {self.unit}/s"
        if 0 < rate < 0.1:
            speed = f"{1 / rate:.1f} s/{self.unit.removesuffix('s')}"
        if self.total is None:
            return f"{self.label}  {self.done} {self.unit}  {speed}{metrics}"
        seconds_left = (self.total - self.done) / rate if rate > 0 else float("inf")
        return (
            f"{self.label}  {self.done}/{self.total} {self.unit}  {speed}  "
            f"ETA {format_duration(seconds_left)}{metrics}"
        )

    def _open_bar(self) -> None:
        """Open the bar once, when the work has taken `min_seconds`."""
        if self._bar_pending and time.monotonic() - self.start >= self.min_seconds:
            self._bar, self._bar_pending = _Bar.open(self.label, self.total), False

    def _show(self) -> None:
        self.last_shown, self.shown_done = time.monotonic(), self.done
        if self.silent:
            return
        line = self.line()
        if self._bar is None:
            log.info("%s", line)
            return
        self._bar.update(self.done, line.removeprefix(self.label).strip())
        if self.last_shown - self.last_logged >= LOG_INTERVAL or self.done == self.total:
            self.last_logged = self.last_shown
            log_to_files_only(line)


class _Bar:
    """One bar of the display, which all bars of a process share: a terminal has only one.

    The display ends with its last bar. A write error ends it at once, because a closed terminal
    must not end a run.
    """

    _display: Bars | None = None

    def __init__(self, task: TaskID) -> None:
        self.task = task

    @classmethod
    def open(cls, label: str, total: int | None) -> _Bar | None:
        """A new bar; None if stderr is not a terminal, or cannot be redrawn."""
        if not sys.stderr.isatty():
            return None
        try:
            if cls._display is None:
                display = _new_display()
                if display.console.is_dumb_terminal:
                    return None
                display.start()
                cls._display = display
            return cls(cls._display.add_task(label, total=total, state=""))
        except OSError:
            cls._stop()
            return None

    def update(self, done: int, state: str) -> None:
        """Redraw the bar."""
        if self._display is None:
            return
        try:
            self._display.update(self.task, completed=done, state=state, refresh=True)
        except OSError:
            self._stop()

    def close(self, line: str | None) -> None:
        """Replace the bar by a line, or remove it."""
        if self._display is None:
            return
        try:
            self._display.remove_task(self.task)
            if line is not None:
                self._display.console.print(line, markup=False, highlight=False, soft_wrap=True)
            if not self._display.task_ids:
                self._stop()
        except OSError:
            self._stop()

    @classmethod
    def _stop(cls) -> None:
        display, _Bar._display = cls._display, None
        if display is not None:
            with suppress(OSError):
                display.stop()


def _new_display() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    # No refresh thread: an error in a thread would print a traceback.
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}", markup=False),
        console=Console(file=sys.stderr),
        auto_refresh=False,
        transient=True,
    )
