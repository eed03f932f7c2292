"""A process next to a rank in which an engine runs: vLLM creates process groups, which a rank
already has.

The two processes communicate over a socket pair. Of the child, `EngineProcess` is the parent's
side and `serve` its own. A call is (method, arguments); the child answers with messages (kind,
value): any number of other kinds, then "result" or "error".
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from pocl_ds.errors import PoclError, ResourceError
from pocl_ds.resources import module_command
from pocl_ds.runtime.parent_death import bound_command
from pocl_ds.runtime.visible_gpus import gpu_variables

# Environment variables that make a process a rank of a group, or part of a workflow step: the child
# is neither.
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "POCL_EXITS",
    "POCL_WITHIN",
)


class EngineProcess:
    """The child process, as its parent sees it. One thread at a time may call it; `close` may
    interrupt a call of another thread.
    """

    purpose = "engine"  # what the process does, for messages: `the process that ...`
    alternative = ""  # the setting of the recipe that does not need the process
    _in_call = False  # the child has not answered yet

    def __init__(self, module: str, *, threads: int, device: str | None) -> None:
        """Start the child, `python -m MODULE FD`. threads: of the CPU. device: the GPUs that it may
        use, as `visible_devices` names them; None: those of this process.
        """
        # The child's environment: not a rank, its own GPUs and number of threads.
        environment = {
            name: value for name, value in os.environ.items() if name not in RANK_VARIABLES
        }
        environment["OMP_NUM_THREADS"] = str(threads)
        if device is not None:
            environment |= gpu_variables(device)

        # Start the child with one end of the socket pair.
        parent_socket, child_socket = socket.socketpair()
        descriptor = child_socket.fileno()
        with child_socket:
            self.process = subprocess.Popen(
                bound_command([*module_command(module), str(descriptor)]),
                pass_fds=(descriptor,),
                env=environment,
                start_new_session=True,
            )
        self.connection = Connection(parent_socket.detach())

    def close(self) -> None:
        """End the process. A call that another thread waits for raises ResourceError there."""
        if self.process.poll() is None:
            # A child that computes does not notice that its connection is closed.
            if self._in_call:
                self.process.terminate()
            else:
                self.connection.close()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def messages(self, method: str, *arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call a method of the child, and pass its messages on; the last one is the result. Raises
        ResourceError with the child's message, or if the child has ended.
        """
        with self.explained_end():
            self._in_call = True
            self.connection.send((method, arguments))
        while self._in_call:
            with self.explained_end():
                kind, value = self.connection.recv()
            self._in_call = kind not in ("result", "error")
            if kind == "error":
                raise ResourceError(value)
            yield kind, value

    @contextlib.contextmanager
    def explained_end(self) -> Iterator[None]:
        """Within the block a broken connection raises ResourceError: the child has ended."""
        try:
            yield
        except (EOFError, OSError, pickle.PickleError) as error:
            self._in_call = False
            code = self.process.wait(timeout=30)
            reason = f" ({error})" if str(error) else ""
            raise ResourceError(
                f"the process that {self.purpose} ended with code {code}{reason}: its error "
                f"message is above; {self.alternative} works without it"
            ) from None


def serve(connection: Connection, answer: Callable[[str, tuple[Any, ...]], Any]) -> None:
    """Answer calls until the parent closes the connection. Only errors with a message for users
    reach the parent.
    """
    while True:
        try:
            method, arguments = connection.recv()
            try:
                value = answer(method, arguments)
            except PoclError as error:
                connection.send(("error", str(error)))
            else:
                connection.send(("result", value))
        except (EOFError, ConnectionError):
            return
