"""Progress: lines in a log, bars in a terminal."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pocl_ds.runtime import progress as module
from pocl_ds.runtime.logs import log, log_to_file, setup_logging
from pocl_ds.runtime.progress import Progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are logged."""
    logged: list[str] = []
    monkeypatch.setattr(log, "level", logging.INFO)
    monkeypatch.setattr(log, "info", lambda text, *values: logged.append(text % values))
    return logged


def test_the_final_state_is_logged_once(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_INTERVAL", 0.0)
    with Progress(3, "steps", "train") as progress:
        for _ in range(3):
            progress.advance(loss=1.23456)
    assert len(lines) == 3
    assert lines[-1].startswith("train  3/3 steps") and lines[-1].endswith("loss 1.235")


def test_a_state_that_was_not_logged_is_logged_at_the_end(lines: list[str]) -> None:
    with Progress(3, "samples", "score", done=1) as progress:
        progress.advance(2)
    assert len(lines) == 1 and lines[0].startswith("score  3/3 samples")


def test_finished_work_logs_nothing(lines: list[str]) -> None:
    with Progress(3, "samples", "score", done=3):
        pass
    assert lines == []


def test_slow_work_has_seconds_per_unit(lines: list[str]) -> None:
    progress = Progress(2, "steps", "train")
    progress.start -= 20
    progress.advance()
    progress.close()
    assert "20.0 s/step " in lines[0] and "ETA 20 s" in lines[0]


class Terminal:
    """A pseudo-terminal as stderr, and the text that was written to it."""

    def __init__(self) -> None:
        self.main, side = os.openpty()
        self.stream = open(side, "w", encoding="utf-8")  # noqa: SIM115
        self.text = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with suppress(OSError):
            while data := os.read(self.main, 65536):
                self.text += data.decode()

    def close(self) -> None:
        """Close it, after reading all that was written."""
        with suppress(OSError):
            self.stream.close()
        self.reader.join(timeout=5)
        with suppress(OSError):
            os.close(self.main)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> Iterator[Terminal]:
    """A terminal as stderr. Not a fixture: pytest sets sys.stderr after fixtures."""
    with monkeypatch.context() as patch:
        opened = Terminal()
        patch.setattr(sys, "stderr", opened.stream)
        patch.setattr(module, "TERMINAL_INTERVAL", 0.0)
        patch.setenv("TERM", term)
        patch.setenv("COLUMNS", "120")
        setup_logging()
        yield opened
        assert module._Bar._display is None and sys.stderr is opened.stream
    opened.close()


def test_bars_of_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two bars share the terminal; log lines are printed above them; the log file has no bar."""
    with (
        terminal(monkeypatch) as screen,
        log_to_file(tmp_path / "log"),
        Progress(2, "steps", "train") as outer,
    ):
        with Progress(4, "responses", "rollout") as inner:
            inner.advance(4)
        log.info("a line of the log")
        outer.advance(2, loss=0.5)
    assert "━" in screen.text and "a line of the log" in screen.text
    text = (tmp_path / "log").read_text()
    for line in ("rollout  4/4 responses", "train  2/2 steps"):
        assert line in screen.text and line in text
    assert "loss 0.5" in screen.text and "━" not in text


def test_a_terminal_that_cannot_be_redrawn_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, term="dumb") as screen, Progress(2, "steps", "train") as progress:
        progress.advance(2)
    assert "train  2/2 steps" in screen.text and "\x1b" not in screen.text


def test_progress_survives_a_closed_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main, side = os.openpty()
    terminal = open(side, "w", encoding="utf-8")  # noqa: SIM115 # closing it fails too
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "TERMINAL_INTERVAL", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    setup_logging()
    try:
        with log_to_file(tmp_path / "log"), Progress(3, "steps", "train") as progress:
            progress.advance()
            os.close(main)
            with pytest.raises(OSError, match="Input/output"):
                print("lost", file=terminal, flush=True)
            progress.advance()
            progress.advance()
            log.info("the end")
    finally:
        monkeypatch.undo()
        with suppress(OSError):
            terminal.close()
    assert module._Bar._display is None
    text = (tmp_path / "log").read_text()
    assert "train  3/3 steps" in text and "the end" in text
