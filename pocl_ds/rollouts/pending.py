"""Responses that were requested from the generator of each rank, and may still be generated."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocl_ds.runtime import distributed

RESPONSES_FILE = "rollout_responses.json"  # in a checkpoint
CLOSE_SECONDS = 60.0  # that a generator has to end after it was closed

Responses = list[list[int]]  # token ids


@dataclass
class PendingRollout:
    """The responses to the prompts of one optimizer step.

    Each rank generates its share with `task`; `collect` joins the shares of all ranks.
    """

    step: int
    rows: NDArray[np.int64]  # whose prompts the responses answer
    staleness_steps: int  # optimizer steps from the generator's weights to `step`
    weight_sync_seconds: float = 0.0
    task: Future[tuple[Responses, float]] | None = None  # this rank's share, and its seconds
    responses: Responses | None = None  # of all ranks
    seconds: float = 0.0  # of generation, on the slowest rank

    def answers(self, rows: NDArray[np.int64], step: int) -> bool:
        """Whether these are responses to the prompts of `rows` at a step."""
        return self.step == step and np.array_equal(self.rows, rows)

    def collect(self) -> Responses:
        """The responses of all ranks. All ranks call it together; it waits for the generators, and
        raises their errors on all ranks.
        """
        if self.responses is None:
            share: tuple[Responses, float] = [], 0.0
            with distributed.raise_on_all_ranks("generate the student's responses"):
                assert self.task is not None
                share = self.task.result()
            shares = distributed.gather_objects(share)
            self.responses = [response for responses, _ in shares for response in responses]
            self.seconds = max(seconds for _, seconds in shares)
        return self.responses

    def wait(self) -> None:
        """Wait until this rank's generator is done, and ignore its result."""
        if self.task is not None:
            wait([self.task], timeout=CLOSE_SECONDS)

    def save(self, folder: Path) -> Path:
        """Save collected responses to a checkpoint's folder."""
        state = {
            "step": self.step,
            "rows": self.rows.tolist(),
            "staleness_steps": self.staleness_steps,
            "weight_sync_seconds": self.weight_sync_seconds,
            "responses": self.responses,
            "seconds": self.seconds,
        }
        (folder / RESPONSES_FILE).write_text(json.dumps(state))
        return folder / RESPONSES_FILE

    @classmethod
    def load(cls, folder: Path) -> PendingRollout | None:
        """Load what `save` wrote to a checkpoint's folder; None if there is nothing."""
        path = folder / RESPONSES_FILE
        if not path.is_file():
            return None
        state = json.loads(path.read_text())
        return cls(**{**state, "rows": np.array(state["rows"], np.int64)})


def start_generation(
    generate: Callable[[], Responses], *, in_background: bool
) -> Future[tuple[Responses, float]]:
    """Call `generate` now, or in a thread that does not keep the process alive. The result holds
    its responses and its seconds, or its error.
    """
    task: Future[tuple[Responses, float]] = Future()

    def run() -> None:
        start = time.monotonic()
        try:
            responses = generate()
        except Exception as error:
            task.set_exception(error)
        else:
            task.set_result((responses, time.monotonic() - start))

    if in_background:
        threading.Thread(target=run, name="rollout", daemon=True).start()
    else:
        run()
    return task
