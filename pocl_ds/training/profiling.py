"""A profile of some optimizer steps of rank 0 (`train.profile_steps`)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pocl_ds.runtime import distributed
from pocl_ds.workflow.files import explain_disk_errors

log = logging.getLogger("pocl_ds")

LARGEST_ENTRIES = 10  # in the table


class StepProfiler:
    """Writes a trace of consecutive optimizer steps, for Perfetto or chrome://tracing, and a table
    of the operations that took the longest.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None) -> None:
        """steps: the first and the last step to profile, counted from 1; None for none."""
        self.directory = directory
        self.steps = steps if distributed.rank() == 0 else None
        self._profile: Any = None
        self._profiled: list[int] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the block if it is one of the steps."""
        if self.steps is None or not self.steps[0] <= number <= self.steps[1]:
            yield
            return
        if self._profile is None:
            self._profile = torch.profiler.profile()  # of the CPU, and of a GPU if there is one
            self._profile.start()
        self._profiled.append(number)
        with torch.profiler.record_function(f"optimizer step {number}"):
            yield
        if number == self.steps[1]:
            self.close()

    def close(self) -> None:
        """Write the files, also if the training ends within the steps."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.stop()
        name = f"steps-{self._profiled[0]}-{self._profiled[-1]}"
        column = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with explain_disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self.directory / f"{name}.json.gz"))
            table = profile.key_averages().table(sort_by=column, row_limit=LARGEST_ENTRIES)
            (self.directory / f"{name}.txt").write_text(table, encoding="utf-8")
        log.info("profile steps=%s directory=%s", name.removeprefix("steps-"), self.directory)
