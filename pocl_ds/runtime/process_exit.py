"""How a process starts and ends: its rank, signals before training can save, and exit records.

Each rank writes an exit record, the small file `$POCL_EXITS/rank-R.CODE.json`. Exit codes alone
cannot tell which rank failed first, because the launcher ends the other ranks, and each of them
then exits with another code. The code is in the file's name, since a full disk may still take an
empty file.
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

from pocl_ds.errors import EXIT_RESUME, LOST_RANK, ResourceError, connection_fault

# Signals that stop the work with everything saved. SIGHUP comes when the terminal is closed.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
EXIT_RECORDS = "POCL_EXITS"  # environment variable: folder of the exit records
# Environment variable: rank in the launcher's numbers, where RANK is one among fewer processes.
JOB_RANK = "POCL_JOB_RANK"
_received: set[int] = set()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment.

    Raises ResourceError for values that are not possible.
    """
    numbers = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default))
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ResourceError(
                f"{name}={text!r} is not a number: start ranks with launch/train.sh, or unset it"
            )
        numbers.append(int(text))
    rank, world_size = numbers
    if "RANK" in os.environ and rank >= world_size:
        raise ResourceError(
            f"RANK={rank} is not less than WORLD_SIZE={world_size}: start ranks with "
            "launch/train.sh, or unset both"
        )
    if "RANK" in os.environ and world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ResourceError(
                    f"{name} is not set, and {world_size} ranks need it to connect: start ranks "
                    "with launch/train.sh"
                )
    return rank, world_size


def install_signal_handlers() -> None:
    """End this process with exit code EXIT_RESUME on TERM, USR1, USR2 and HUP. With `nohup`, HUP
    stays ignored.

    Ctrl-C still raises KeyboardInterrupt, and `was_interrupted` remembers it. If Python drops that
    exception in a destructor, the signal is sent again. Training replaces these handlers as long as
    it has a state to save.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit_for_resume)
    _received.clear()
    # A background job of a shell ignores Ctrl-C: leave that unchanged.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = functools.partial(_repeat_interrupt, sys.unraisablehook)


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed. The KeyboardInterrupt itself may be lost: C code that imports a
    module turns it into an ImportError.
    """
    return signal.SIGINT in _received


def _interrupt(number: int, frame: Any) -> None:
    _received.add(signal.SIGINT)
    signal.default_int_handler(number, frame)


def _repeat_interrupt(unraisablehook: Callable[[Any], object], unraisable: Any) -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
        timer.daemon = True
        timer.start()
    else:
        unraisablehook(unraisable)


def _exit_for_resume(number: int, _frame: Any) -> None:
    for other in SIGNALS:  # a second signal must not interrupt the clean-up
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(number).name
    print_error(f"pocl: {name}: stopped; finished work is saved; run the same command to continue")
    raise SystemExit(EXIT_RESUME)


def explain_lost_rank(error: BaseException) -> str | None:
    """A sentence for the error of a collective whose other end is gone; None for other errors."""
    if not isinstance(error, RuntimeError) or (fault := connection_fault(error)) is None:
        return None
    return (
        f"rank {os.environ.get('RANK', '0')} {LOST_RANK} ({fault}), which failed first: finished "
        "work is saved; run the same command again to continue"
    )


def print_error(sentence: str) -> None:
    """Print to stderr. If that fails (the log's disk is full, the terminal is gone), the process
    still ends with its own exit code.
    """
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def exit_process(code: int) -> NoReturn:
    """End this process with `code`, without Python's own clean-up.

    Of a rank, threads of gloo may still hold tensors of a collective, and a process that finalizes
    Python meanwhile sometimes aborts after all its work is done (pytorch/pytorch#190489). A forked
    process would first copy hundreds of megabytes of modules to take them apart.
    """
    # From now on Ctrl-C ends the process at once, without a traceback from Python's clean-up.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A rank that disappears without destroying its process group makes the others wait.
    torch = sys.modules.get("torch")
    if code == 0 and torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def node_name() -> str:
    """This machine's name in SLURM, which is often shorter than the host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def record_exit(code: int, error: str = "") -> None:
    """Write this rank's exit record, if the launcher asks for one. A second record is ignored."""
    folder = os.environ.get(EXIT_RECORDS)
    if not folder:
        return
    rank = f"rank-{os.environ.get(JOB_RANK) or os.environ.get('RANK', '0')}"
    path = Path(folder) / f"{rank}.{code}.json"
    record = {"code": code, "error": error, "time": time.time(), "node": node_name()}
    # An error here must not hide the one that is recorded.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not any(path.parent.glob(f"{rank}.*")):
            with path.open("x", encoding="utf-8") as stream:
                json.dump(record, stream)


def read_exit_records(folder: Path) -> list[dict[str, Any]]:
    """The exit records in a folder, by time: `rank` (as in "rank-0"), `code`, `error`, `time`,
    `node`. Of an incomplete record only rank, code and time are known; the others are empty.
    """
    records = []
    for path in folder.glob("rank-*.*.json"):
        rank, code, _ = path.name.split(".")
        record = {"code": int(code), "error": "", "time": path.stat().st_mtime, "node": ""}
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(path.read_text())
        records.append({**record, "rank": rank})
    return sorted(records, key=lambda record: record["time"])
