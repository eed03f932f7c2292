"""Where the time of an optimizer step goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

# Parts of a step that are measured; `wait` is the rest of it.
PARTS = ("data", "teacher", "student", "optimizer")
ROLLOUT = "rollout"  # measured too, and reported by the rollout worker


class StepTimer:
    """Measures one optimizer step and its parts: on a GPU by events in the stream, which the host
    reads when they have passed, else by the clock.

    On a GPU a part is therefore the time of the device, and `data` the time that it had no batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]]]
        self._spans = defaultdict(list)
        self._start = self._end = self._mark()

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = self._mark()
        yield
        self._spans[part].append((start, self._mark()))

    def stop(self) -> None:
        """End the step."""
        self._end = self._mark()

    def wait(self) -> None:
        """Wait until the device has reached the end of the step."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()

    @property
    def seconds(self) -> float:
        """Time of the whole step, after `wait`."""
        return _seconds_between(self._start, self._end)

    def breakdown(self) -> dict[str, float]:
        """Seconds of each part, as metrics. `wait_seconds` is the rest of the step: other ranks,
        and on a GPU the time without work.
        """
        seconds = {
            part: sum(_seconds_between(*span) for span in self._spans[part])
            for part in (*PARTS, ROLLOUT)
        }
        wait = max(0.0, self.seconds - sum(seconds.values()))
        return {**{f"{part}_seconds": seconds[part] for part in PARTS}, "wait_seconds": wait}

    def _mark(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(end, float)
    return end - start
