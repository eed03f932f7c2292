"""How a process comes and leaves: as which rank, asked by a signal before it can save, and a word
on why it left.

The word of each rank is a small file, POCL_EXITS/rank-R.json. An exit code alone cannot tell which
rank failed first: the launcher ends the others, each with a code of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pocl_ds.errors import RESUME, ResourceError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FOLDER = "POCL_EXITS"
_came: set[int] = set()  # signals that were only noted


def place_among_ranks() -> tuple[int, int]:
    """This process's number and that of all ranks, from the launcher's environment. Raises
    ResourceError for what cannot be.
    """
    found = []
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(alone))
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ResourceError(
                f"{name}={text!r} is no number: start ranks through launch/train.sh, or unset it"
            )
        found.append(int(text))
    rank, ranks = found
    if "RANK" in os.environ and rank >= ranks:
        raise ResourceError(
            f"RANK={rank} is not below WORLD_SIZE={ranks}: start ranks through launch/train.sh, "
            f"or unset both"
        )
    if "RANK" in os.environ and ranks > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ResourceError(
                    f"{name} is not set, where {ranks} ranks would meet: start ranks through "
                    f"launch/train.sh"
                )
    return rank, ranks


def leave_when_asked() -> None:
    """From now on TERM, USR1 and USR2 end this process with RESUME: what is finished is kept.
    Ctrl-C is a KeyboardInterrupt as before, and `interrupted` remembers it; it comes again where
    Python would print and forget it, in a destructor.

    Training puts its own handlers in their place while it has something to save.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)
    _came.clear()
    if (
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    ):  # a shell's background job ignores it, and so do we
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = functools.partial(_again, sys.unraisablehook)


def interrupted() -> bool:
    """Whether Ctrl-C came, whatever became of the KeyboardInterrupt: C code that was importing
    makes an ImportError of it.
    """
    return signal.SIGINT in _came


def _interrupt(number: int, frame: Any) -> None:
    _came.add(signal.SIGINT)
    signal.default_int_handler(number, frame)


def _again(others: Callable[[Any], object], unraisable: Any) -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
        timer.daemon = True
        timer.start()
    else:
        others(unraisable)


def _leave(number: int, _frame: Any) -> None:
    for other in SIGNALS:  # a second one must not interrupt the tidying up
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(number).name
    last_word(f"pocl: {name}: leaving; finished work is kept, the same command goes on")
    raise SystemExit(RESUME)


def last_word(sentence: str) -> None:
    """Say on stderr why this process leaves. Where that cannot be written, as on a full disk that a
    rank's log lies on or to a terminal that is gone, it still leaves as it would have, with the
    same exit code.
    """
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process with `code`, and where it is one of many ranks, without taking the
    interpreter down piece by piece.

    From now on Ctrl-C ends it at once: the traceback of Python's own tidying up helps nobody. And
    gloo's threads may still hold a collective's tensors: a process that tears Python down under
    them now and then aborts after all its work is done (pytorch/pytorch#190489).
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "RANK" not in os.environ:
        sys.exit(code)
    torch = sys.modules.get("torch")
    if code == 0 and torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a rank that just goes makes the others wait
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def node_name() -> str:
    """This machine's name as SLURM has it, which is often not the whole host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def leave_word(code: int, error: str = "") -> None:
    """Note how this rank leaves, where the one that started it wants to know. The first word stays."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    path = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
    with contextlib.suppress(OSError):  # it must never hide the fault that it tells of
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            json.dump(
                {"code": code, "error": error, "time": time.time(), "node": node_name()}, stream
            )


def words_of_ranks(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a step left (see `leave_word`), by time; one that was ended while it wrote
    left nothing.
    """
    found = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(json.JSONDecodeError):
            found.append({**json.loads(path.read_text()), "rank": path.stem})
    return sorted(found, key=lambda word: word["time"])
