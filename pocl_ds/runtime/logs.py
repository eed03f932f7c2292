"""The package's log: lines on stderr and in files, without secrets.

Rank 0 logs everything; the other ranks log warnings and errors, with their number.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pocl_ds.errors import PoclError
from pocl_ds.runtime.credentials import redact
from pocl_ds.workflow.files import explain_disk_errors

log = logging.getLogger("pocl_ds")


class _RedactingFormatter(logging.Formatter):
    """Lines without secrets: a library's message may hold an address with a password or a token."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Lines on the current sys.stderr, which a progress bar replaces while it is shown.

    A closed terminal and a full disk raise no error here: they must not end a run.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _FileHandler(logging.FileHandler):
    """Lines in a file. If writing fails, stderr gets one warning."""

    _warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._warned:
            self._warned = True
            log.warning(
                "%s cannot be written (%s): it lacks the lines from here on",
                self.baseFilename,
                error.strerror,
            )


def setup_logging(rank: int = 0, *, world_size: int = 1) -> None:
    """Send the package's log to stderr: everything of rank 0, and the other ranks' warnings."""
    prefix = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler = _StderrHandler()
    handler.setFormatter(_RedactingFormatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Within the block append the log to a file too, which `pocl watch` and `pocl logs` read. If an
    error ends the block, the file also gets the error, with a traceback unless the user caused it.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(
        _RedactingFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        defect = None if isinstance(error, PoclError) else error
        _write(handler, logging.ERROR, str(error), defect)
        raise
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # of lines that it could not write, and has warned of
            handler.close()


def log_to_files_only(line: str) -> None:
    """Write a line to the log files but not to stderr, where a progress bar shows the same."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            _write(handler, logging.INFO, line)


def _write(handler: logging.Handler, level: int, line: str, error: Exception | None = None) -> None:
    """Write a line to one handler, with the traceback of an error."""
    trace = (type(error), error, error.__traceback__) if error else None
    handler.handle(log.makeRecord(log.name, level, __file__, 0, "%s", (line,), trace))
