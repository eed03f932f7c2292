"""A wrong call of `pocl`, in this process: exit code 2, one sentence, no traceback, and what it
leaves behind.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pocl_ds.cli.main import main
from pocl_ds.runtime.process_exit import SIGNALS


@contextmanager
def own_signals() -> Iterator[None]:
    """A command takes INT, TERM, USR1, USR2 and what no one catches for itself; the tests get them
    back.
    """
    before, hook = (
        {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)},
        sys.unraisablehook,
    )
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def sentence(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence with which `pocl WORDS...` refuses."""
    capsys.readouterr()
    with own_signals():
        code = main([str(word) for word in words])
    said = capsys.readouterr().err
    assert code == 2, (code, said[-2000:])
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("pocl ")]
    assert len(lines) == 1 and said.endswith(lines[0] + "\n"), said[-2000:]
    return lines[0].removeprefix(f"pocl {words[0]}: ")


def files_below(folder: Path) -> set[str]:
    """Names of all files in a folder; none where there is no folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
