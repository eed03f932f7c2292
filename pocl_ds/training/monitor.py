"""Metrics, progress, hang detection and stop signals of a training."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocl_ds.config import TrainConfig
from pocl_ds.errors import EXIT_RESUME, Interrupted
from pocl_ds.runtime import distributed
from pocl_ds.runtime.loss_spikes import LossSpikes
from pocl_ds.runtime.metrics import MetricsWriter, read_metrics
from pocl_ds.runtime.process_exit import SIGNALS
from pocl_ds.runtime.progress import Progress
from pocl_ds.training.watchdog import Watchdog

log = logging.getLogger("pocl_ds")

STOP_SIGNALS = (signal.SIGINT, *SIGNALS)


class StopSignal:
    """Records a signal that asks the training to stop; a second Ctrl-C ends it at once. The
    handlers are installed within the `with` block only.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {
            number: signal.signal(number, self._record)
            for number in STOP_SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        name = signal.Signals(number).name
        log.warning(
            "%s: training stops after this optimizer step or the next, with a checkpoint", name
        )


class TrainingMonitor:
    """The metrics and progress that a training reports, and the signals that it receives. Rank 0
    writes.
    """

    def __init__(self, directory: Path, label: str, train: TrainConfig) -> None:
        """directory: of the training; label: its name in logs and trackers."""
        self.directory, self.label, self.train = directory, label, train
        self.stop = StopSignal()
        self._spikes = LossSpikes()
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._watchdog: Watchdog | None = None

    @contextlib.contextmanager
    def running(self, *, first_step: int, total_steps: int) -> Iterator[None]:
        """Within the block metrics are written, progress is shown, hangs are detected and signals
        recorded. Records after first_step are dropped from metrics.jsonl: those steps run again.
        """
        hang_timeout = self.train.hang_timeout_seconds
        with contextlib.ExitStack() as stack:
            if distributed.rank() == 0:
                tracking = self.train.tracking
                self._writer = MetricsWriter(
                    self.directory,
                    step=first_step,
                    tensorboard=tracking.tensorboard,
                    wandb=tracking.wandb,
                    wandb_project=tracking.wandb_project,
                    name=self.label,
                )
                stack.enter_context(contextlib.closing(self._writer))
            stack.enter_context(self.stop)
            self._watchdog = stack.enter_context(Watchdog(self.directory / "logs", hang_timeout))
            self._progress = stack.enter_context(
                Progress(total_steps, "steps", self.label, done=first_step)
            )
            yield

    def skipped_steps(self) -> int:
        """Non-finite steps that were skipped since the start of the training. All ranks call it."""
        records = read_metrics(self._writer.path, "skipped") if self._writer else []
        return int(distributed.broadcast_object(len(records)))

    def report_alive(self) -> None:
        """Tell the watchdog that this rank makes progress."""
        if self._watchdog:
            self._watchdog.reset()

    def log_step(self, record: dict[str, Any], *, num_stages: int) -> None:
        """Write the record of an optimizer step, warn of a loss spike, and show progress."""
        self.write(record)
        display = {"stage": f"{record['stage'] + 1}/{num_stages}"}
        if record["kind"] == "step":
            ratio = self._spikes.update(record["loss"], record["stage"])
            if ratio is not None:
                log.warning(
                    "%s: the loss of step %d is %.1f times its recent median (%.4f)",
                    self.label,
                    record["step"],
                    ratio,
                    record["loss"],
                )
            display |= {"loss": record["loss"], "tokens/s": record["tokens_per_second"]}
            if "mfu" in record:
                display["MFU"] = f"{100 * record['mfu']:.0f}%"
        if self._progress:
            self._progress.advance(1, **display)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl and the trackers."""
        if self._writer:
            self._writer.write(record)

    def sync(self) -> None:
        """Bring the records to the disk, before a checkpoint makes them final."""
        if self._writer:
            self._writer.sync()

    def interruption(self, step: int, total_steps: int) -> Interrupted:
        """The error that ends a training after a signal, with everything saved."""
        number = self.stop.number or signal.SIGTERM
        return Interrupted(
            f"stopped by {signal.Signals(number).name} after step {step} of {total_steps}: "
            f"everything is saved; run the same command to continue",
            exit_code=128 + number if number == signal.SIGINT else EXIT_RESUME,
        )
