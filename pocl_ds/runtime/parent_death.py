"""Child processes that end with their parent, also if it is killed and cannot end them itself.

As a program it runs a command in its own place, with the kernel's promise to kill it when the
parent dies (prctl(2), PR_SET_PDEATHSIG), which survives `exec`:

    python -I -S pocl_ds/runtime/parent_death.py PARENT_PID COMMAND ARGUMENT...

The promise is about the thread that started the child, so that thread has to outlive it. This file
imports only the standard library: it runs once for each rank.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def bound_command(command: list[str]) -> list[str]:
    """The command that runs `command` as a child which dies with this process."""
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent, the process `parent`, dies. Without Linux
    this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    _request_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


@functools.cache
def bind_forked_children() -> None:
    """Let every process that this one forks from now on die with it: the pools of DeepSpeed's
    conversion of checkpoints and of the tokenization.
    """
    if sys.platform.startswith("linux"):
        _prctl()  # loaded before the fork: a child should not import
        os.register_at_fork(after_in_child=functools.partial(_request_death_signal, signal.SIGKILL))


def kill_session(session: int) -> None:
    """Kill every process that is left of a session. Its leader must not be reaped yet, so that no
    other process has its id.
    """
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(path.parent.name)
            # The name in parentheses may hold spaces; state, parent, group and session follow it.
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and pid not in (session, os.getpid()):
                os.kill(pid, signal.SIGKILL)


def _request_death_signal(number: int) -> None:
    _prctl()(PR_SET_PDEATHSIG, number, 0, 0, 0)


@functools.cache
def _prctl() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True).prctl


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(int(sys.argv[1]))
    # Python ignores these for itself, and the command would inherit that.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]} cannot be started ({error.strerror})")


if __name__ == "__main__":
    _main()
