"""Child processes of a step. Each runs in its own session and dies with this process; signals to
this process are forwarded to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pocl_ds.errors import Interrupted
from pocl_ds.runtime.parent_death import bound_command, kill_session
from pocl_ds.runtime.process_exit import SIGNALS
from pocl_ds.runtime.signal_causes import describe_signal

FORWARDED_SIGNALS = (signal.SIGINT, *SIGNALS)


def run_process(command: list[str]) -> int:
    """Run one command and wait for its end. See `run_processes`."""
    return run_processes([command], [{}])


def run_processes(commands: list[list[str]], environments: list[dict[str, str]]) -> int:
    """Run commands at the same time, each with its own environment variables, and wait for all.
    Returns the first exit code that is not 0. Of a child that fails, nothing stays behind.

    If no child handles a forwarded signal, because it is still starting or about to exit, this
    process's own handler runs and may raise.

    Raises:
        Interrupted: a signal ended a child.
    """
    children: list[subprocess.Popen[bytes]] = []

    def send(number: int) -> None:
        for child in children:
            child.send_signal(number)

    with forward_signals(send) as received:
        for command, variables in zip(commands, environments, strict=True):
            if received:
                break
            children.append(start_process(command, variables))
            if received:  # the signal arrived before the child was in the list
                children[-1].send_signal(received[-1])
        codes = [(child.pid, _wait(child)) for child in children]
    return exit_code(codes, received)


@contextlib.contextmanager
def forward_signals(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Within the block `send` gets the number of each signal that would end this process. Yields
    the list of those that arrived.

    Children ignore the signals that this process ignores, so those are not forwarded.
    """
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        send(number)

    forwarded = [
        number for number in FORWARDED_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
    ]
    handlers = {number: signal.signal(number, forward) for number in forwarded}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_code(codes: Sequence[tuple[int, int]], received: Sequence[int]) -> int:
    """The exit code of a step from the process id and the code of each of its children, as in
    `subprocess.Popen`: the first that is not 0.

    received: signals that were forwarded to them. Raises as `run_processes`.
    """
    # A child that exits with a code above 1 has logged why. Otherwise handle the signal here.
    code = next((code for _, code in codes if code > 0), 0)
    if received and code in (0, 1):
        signal.raise_signal(received[0])
    killed = next(((pid, -code) for pid, code in codes if code < 0), None)
    if killed and not code:
        pid, number = killed
        raise Interrupted(
            f"a process of this step was {describe_signal(number, pid)}: finished work is "
            "saved; run the same command again to continue",
            exit_code=128 + number,
        )
    return code


def kill_workers_of_failed(pid: int) -> None:
    """Wait for the end of a child without reaping it, and kill the workers that it leaves behind if
    it fails.
    """
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its id is not reused yet
    if state is not None and (state.si_code != os.CLD_EXITED or state.si_status):
        kill_session(pid)


def _wait(child: subprocess.Popen[bytes]) -> int:
    kill_workers_of_failed(child.pid)
    return child.wait()


def start_process(
    command: list[str], variables: dict[str, str], *, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """A child in its own session. launch/train.sh sets the threads of ranks itself.

    pass_fds: file descriptors that it inherits besides the standard ones.
    """
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
            bound_command(command), start_new_session=True, env=environment, pass_fds=pass_fds
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
