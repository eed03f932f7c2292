"""How a process leaves: asked by a signal before it can save, and a word on why, for whoever started many of them.

The word of each rank is a small file, POCL_EXITS/rank-R.json. An exit code alone cannot tell which rank failed first: the
launcher ends the others, each with a code of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pocl_ds.errors import RESUME

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FOLDER = "POCL_EXITS"


def leave_when_asked() -> None:
    """From now on TERM, USR1 and USR2 end this process with RESUME: what is finished is kept.

    Training puts its own handlers in their place while it has something to save.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, _frame: Any) -> None:
    for other in SIGNALS:  # a second one must not interrupt the tidying up
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(number).name
    print(f"pocl: {name}: leaving; finished work is kept, the same command goes on", file=sys.stderr, flush=True)
    raise SystemExit(RESUME)


def leave_word(code: int, error: str = "") -> None:
    """Note how this rank leaves, where the one that started it wants to know. The first word stays."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    path = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
    with contextlib.suppress(OSError):  # it must never hide the fault that it tells of
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            json.dump({"code": code, "error": error, "time": time.time(), "node": os.uname().nodename}, stream)
