"""Child processes of a step. Each runs in its own session and inherits the run directory's lock;
signals to this process are forwarded to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

from pocl_ds.errors import Interrupted

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run_process(command: list[str], lock: int | None = None) -> int:
    """Run one command and wait for its end. See `run_processes`."""
    return run_processes([command], [{}], lock)


def run_processes(
    commands: list[list[str]], environments: list[dict[str, str]], lock: int | None = None
) -> int:
    """Run commands at the same time, each with its own environment variables, and wait for all.
    Returns the first exit code that is not 0.

    lock: handle of the run directory's lock, which the children inherit.

    If no child handles a forwarded signal, because it is still starting or about to exit, this
    process's own handler runs and may raise.

    Raises:
        Interrupted: a signal ended a child.
    """
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    # Children ignore the signals that this process ignores, so those are not forwarded.
    forwarded = [
        number for number in FORWARDED_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
    ]
    handlers = {number: signal.signal(number, forward) for number in forwarded}
    try:
        for command, variables in zip(commands, environments, strict=True):
            if received:
                break
            children.append(_start(command, variables, lock))
            if received:  # the signal arrived before the child was in the list
                children[-1].send_signal(received[-1])
        codes = [child.wait() for child in children]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    # A child that exits with a code above 1 has logged why. Otherwise handle the signal here.
    code = next((code for code in codes if code > 0), 0)
    if received and code in (0, 1):
        signal.raise_signal(received[0])
    killed_by = next((-code for code in codes if code < 0), 0)
    if killed_by and not code:
        raise Interrupted(
            f"a process of this step was ended by {signal.Signals(killed_by).name}, often because "
            "memory ran out: finished work is saved; run the same command again to continue",
            exit_code=128 + killed_by,
        )
    return code


def _start(
    command: list[str], variables: dict[str, str], lock: int | None
) -> subprocess.Popen[bytes]:
    """A child in its own session. launch/train.sh sets the threads of ranks itself."""
    environment = {
        **os.environ,
        "POCL_PYTHON": sys.executable,
        "POCL_WITHIN": "1",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
    # Hide torch's C++ warnings (vLLM's about NUMA) unless the user asks for them.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if command[0] != "bash":
        environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

    # Ctrl-C stays blocked until launch/pocl.py has its handlers. A shell would never unblock it, so
    # the launcher of ranks starts with it unblocked.
    blocked = set() if command[0] == "bash" else {signal.SIGINT}
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        return subprocess.Popen(
            command,
            start_new_session=True,
            env=environment,
            pass_fds=() if lock is None else (lock,),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
