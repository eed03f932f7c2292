"""Hangs are found: a rank that says nothing for too long writes every thread's stack and ends the
process.

In a hung collective all ranks fall silent, so each leaves its own stacks: the one that is somewhere
else is the culprit.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from pocl_ds.errors import HANG
from pocl_ds.runtime import distributed
from pocl_ds.runtime.process_exit import last_word, leave_word

# Where a thread cannot run because C code holds the interpreter, faulthandler's own timer fires
# this much later.
LATER = 30.0


class Watchdog:
    """Ends the process, with stacks in `directory`/stacks-rank-R.txt, when `beat` was not called
    for `seconds`.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self.path, self.seconds = directory / f"stacks-rank-{distributed.rank()}.txt", seconds
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._stream = self.path.open("w", encoding="utf-8")
        self.beat()
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

    def beat(self) -> None:
        """Something was done."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + LATER, exit=True, file=self._stream)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._last
            if silent < self.seconds:
                continue
            faulthandler.dump_traceback(self._stream, all_threads=True)
            self._stream.flush()
            said = (
                f"rank {distributed.rank()} did nothing for {silent:.0f} s "
                f"(train.hang_timeout_seconds={self.seconds:g}): the stacks of "
                f"its threads are in {self.path}; the run ends, the same command goes on from the "
                f"last checkpoint"
            )
            last_word(said)
            leave_word(HANG, said)
            os._exit(HANG)
