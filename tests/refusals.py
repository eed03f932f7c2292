"""Calls of `pocl` that are refused, in this process: exit code 2, one sentence, no traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pocl_ds.cli.main import main
from pocl_ds.runtime.process_exit import SIGNALS
from pocl_ds.workflow.manifest import VERIFIED


@contextmanager
def restored_signals() -> Iterator[None]:
    """Restore the signal handlers and sys.unraisablehook, which a command replaces."""
    handlers, unraisable_hook = (
        {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)},
        sys.unraisablehook,
    )
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = unraisable_hook


def error_message(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The error message of `pocl WORDS...`, which must be one sentence."""
    capsys.readouterr()
    with restored_signals():
        code = main([str(word) for word in words])
    stderr = capsys.readouterr().err
    assert code == 2, (code, stderr[-2000:])
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("pocl ")]
    assert len(lines) == 1 and stderr.endswith(lines[0] + "\n"), stderr[-2000:]
    return lines[0].removeprefix(f"pocl {words[0]}: ")


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files below a folder, except the records of verified files; empty if
    there is no folder.
    """
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != VERIFIED
    }
