"""Hang detection: a rank without progress for too long writes the stack of every thread and exits.

In a collective that hangs all ranks stop making progress, so each writes its own stacks: the rank
that is somewhere else is the cause.
"""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from pocl_ds.errors import EXIT_HANG
from pocl_ds.runtime import distributed
from pocl_ds.runtime.process_exit import print_error, record_exit

# If the thread below cannot run because C code holds the interpreter, faulthandler's own timer
# fires so many seconds later.
FALLBACK_DELAY = 30.0
OTHERS_SECONDS = 10.0  # that a rank waits at most before it exits, for the stacks of the others


class Watchdog:
    """Ends the process if `reset` was not called for `seconds`, with the stacks of its threads in
    stacks-rank-R.txt in `directory`.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self.path, self.seconds = directory / f"stacks-rank-{distributed.job_rank()}.txt", seconds
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._stream = self.path.open("w", encoding="utf-8")
        self.reset()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._stream.close()
        self.path.unlink(missing_ok=True)

    def reset(self) -> None:
        """Record that this rank has made progress."""
        self._last_reset = time.monotonic()
        delay = self.seconds + FALLBACK_DELAY
        faulthandler.dump_traceback_later(delay, exit=True, file=self._stream)

    def pause(self) -> None:
        """Do not watch until the next `reset`, while this rank waits for work."""
        self._last_reset = math.inf
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            idle_seconds = time.monotonic() - self._last_reset
            if idle_seconds < self.seconds:
                continue
            faulthandler.dump_traceback(self._stream, all_threads=True)
            self._stream.flush()
            message = (
                f"rank {distributed.job_rank()} made no progress for {idle_seconds:.0f} s "
                f"(train.hang_timeout_seconds={self.seconds:g}): its stack traces are in "
                f"{self.path}. The run stops; the same command resumes from the last checkpoint"
            )
            print_error(message)
            record_exit(EXIT_HANG, message)
            # The launcher stops the other ranks once this one ends: let them write theirs first.
            time.sleep(min(OTHERS_SECONDS, self.seconds / 4))
            os._exit(EXIT_HANG)
