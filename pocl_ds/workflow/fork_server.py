"""A process that imports the large libraries once and forks one child for each step.

Importing torch, transformers and vLLM takes longer than most steps of a small run. A forked child
has them from its first moment, and it is a process like any other: its memory is free when it
ends, it has its own logs, signals and exit code, and it dies with the run. The server itself only
imports: it runs no tensor operation. If an import touches a GPU, a fork cannot use that GPU, and
the child starts Python anew in its own process.

As a program it answers on the socket with the given file descriptor:

    python launch/pocl.py pocl_ds.workflow.fork_server FILE_DESCRIPTOR

A request is a line of JSON, `{"module": name, "arguments": [word], "imports": [name]}`, and so is
the answer, `{"pid": number, "code": number}` with a code as in `subprocess.Popen`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from pocl_ds.resources import module_command
from pocl_ds.runtime.parent_death import die_with_parent
from pocl_ds.runtime.process_exit import install_signal_handlers
from pocl_ds.runtime.run_module import run_module
from pocl_ds.workflow.processes import (
    FORWARDED_SIGNALS,
    exit_code,
    forward_signals,
    kill_workers_of_failed,
    start_process,
)
from pocl_ds.workflow.shared_imports import SHARED_IMPORTS


class ForkServer:
    """Runs modules of this package in children of a server, which starts with the first one.

    variables: of the environment of all of them, besides those of this process.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables = dict(variables or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, module: str, arguments: Sequence[str], imports: Sequence[str] = ()) -> int:
        """Run a module as a program in its own process and wait for its end. Returns its exit
        code.

        imports: names in `SHARED_IMPORTS`, which the server runs before it forks. Signals are
        forwarded, and Interrupted raised, as by `run_processes`.
        """
        request = {"module": module, "arguments": [*arguments], "imports": [*imports]}
        with forward_signals(self._send_signal) as received:
            answer = self._exchange(request, received)
        return exit_code([(answer["pid"], answer["code"])], received)

    def close(self) -> None:
        """End the server. The next `run` starts another one."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.wait()
        self._connection = self._process = None

    def _send_signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _exchange(self, request: dict[str, Any], received: Sequence[int]) -> dict[str, int]:
        """Send a request and wait for the answer. A server that ends without one, since a signal
        ended it, answers with its own exit code.
        """
        if self._process is None or self._connection is None:
            self._connection, other_end = socket.socketpair()
            handle = other_end.fileno()
            command = [*module_command("pocl_ds.workflow.fork_server"), str(handle)]
            with other_end:
                self._process = start_process(command, self._variables, pass_fds=[handle])
            if received:  # the signal arrived before there was a process
                self._send_signal(received[-1])
        line = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            with self._connection.makefile("rb") as stream:
                line = stream.readline()
        if line.endswith(b"\n"):
            answer: dict[str, int] = json.loads(line)
            return answer
        pid, code = self._process.pid, self._process.wait()
        self.close()
        return {"pid": pid, "code": code}


class _Children:
    """The children of this process, one at a time. A signal goes to the child. While there is none
    it goes to this process's own handler, and Ctrl-C ends this process: the run says so.
    """

    def __init__(self) -> None:
        self._child: int | None = None
        self._handlers: dict[int, Any] = {}
        for number in FORWARDED_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._forward)

    def run(self) -> dict[str, int] | None:
        """Fork a child and wait for its end. Returns None in the child."""
        server = os.getpid()
        # A signal waits until it is known whose it is.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers)
        self._child = os.fork()
        if self._child == 0:
            die_with_parent(server)
            os.setsid()
            for number in self._handlers:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handlers)
        if self._child == 0:
            return None
        pid = self._child
        kill_workers_of_failed(pid)
        # Once it is reaped, another process may get its id.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers)
        _, status = os.waitpid(pid, 0)
        self._child = None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handlers)
        return {"pid": pid, "code": os.waitstatus_to_exitcode(status)}

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._child is not None:
            os.kill(self._child, number)
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            handler: Callable[[int, FrameType | None], object] = self._handlers[number]
            handler(number, frame)


def serve(connection: socket.socket) -> tuple[str, list[str]] | None:
    """Answer requests until the other end closes the connection, and return None then. In each
    child, return the module and the arguments that it has to run.
    """
    children = _Children()
    with connection, connection.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            for name in request["imports"]:
                # The step reports a library that cannot be imported, and its own error is better.
                with contextlib.suppress(Exception):
                    SHARED_IMPORTS[name]()
            # Children neither search what was imported for garbage, nor copy its memory for that.
            gc.collect()
            gc.freeze()
            answer = children.run()
            if answer is None:
                return request["module"], request["arguments"]
            connection.sendall(json.dumps(answer).encode() + b"\n")
    return None


def run_program(module: str, arguments: list[str]) -> None:
    """Run a module as a program in this child."""
    if "torch" in sys.modules:
        from pocl_ds.compat.torch_private import is_gpu_lost_by_fork

        if is_gpu_lost_by_fork():
            command = [*module_command(module), *arguments]
            os.execv(command[0], command)
    run_module(module, arguments)


if __name__ == "__main__":
    install_signal_handlers()
    if (program := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        run_program(*program)
