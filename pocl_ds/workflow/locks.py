"""Locks on files, and who holds one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pocl_ds.errors import ResourceError
from pocl_ds.runtime.credentials import redact
from pocl_ds.workflow.files import explain_disk_errors

NO_LOCK_SUPPORT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
COMMAND_LENGTH = 200  # of the holder's command line, in characters

_handles: set[int] = set()  # of the files whose locks this process holds


class LockTakenError(Exception):
    """Another process holds a lock; the message says which."""


@contextlib.contextmanager
def hold_lock(path: Path, operation: int) -> Iterator[None]:
    """Hold a lock within the block. No child inherits it: a worker that outlives this process must
    not hold it.

    operation: as for `fcntl.flock`. This is not `filelock`, since jobs of one run share the lock
    (LOCK_SH), and a file system without locks must stop the run, not fall back to a soft lock.
    Raises LockTakenError if LOCK_NB is set and another process has the lock, ResourceError if the
    file system does not support locks.
    """
    while True:
        # NFS locks only a file that is open for writing.
        with explain_disk_errors(path):
            opened = path.open("a+", encoding="utf-8")
        with opened as stream:
            _handles.add(stream.fileno())
            try:
                _lock(stream, path, operation)
                if not _is_at(stream, path):
                    continue
                _record_holder(stream)
                yield
                return
            finally:
                _handles.discard(stream.fileno())


def _is_at(stream: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at its path: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:
        return False


def _close_in_child() -> None:
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _lock(stream: IO[str], path: Path, operation: int) -> None:
    try:
        fcntl.flock(stream, operation)
    except BlockingIOError:
        raise LockTakenError(_describe_holder(path)) from None
    except OSError as error:
        if error.errno not in NO_LOCK_SUPPORT:
            raise
        raise ResourceError(
            f"{path} cannot be locked ({error.strerror}): its file system is mounted without locks "
            "(mount Lustre with -o flock); choose another folder"
        ) from None


def _record_holder(stream: IO[str]) -> None:
    """Write into the file who holds it, for the message of others. A full disk is ignored."""
    name = os.path.basename(sys.argv[0])
    command = shlex.join(["pocl" if name == "main.py" else name, *sys.argv[1:]])
    holder = {"pid": os.getpid(), "host": os.uname().nodename, "command": redact(command)}
    with contextlib.suppress(OSError):
        stream.truncate(0)
        json.dump(holder, stream)
        stream.flush()


def _describe_holder(path: Path) -> str:
    """Who holds a lock: `process 123 on n1 (pocl run --run-dir x)`."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        command = str(holder["command"])[:COMMAND_LENGTH]
        return f"process {int(holder['pid'])} on {holder['host']} ({command})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another pocl process"
