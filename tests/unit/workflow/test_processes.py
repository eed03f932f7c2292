"""Child processes: exit codes, and signals that reach all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.errors import Interrupted
from pocl_ds.resources import LAUNCHER, module_command
from pocl_ds.workflow.processes import run_process, run_processes


def test_the_first_failing_exit_code_is_returned() -> None:
    commands = [[sys.executable, "-c", f"import sys; sys.exit({code})"] for code in (0, 2, 3)]
    assert run_processes(commands, [{}] * 3) == 2
    assert run_processes(commands[:1] * 2, [{}] * 2) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hangup_signal")
def test_a_signal_reaches_all_children(number: int) -> None:
    """SIGHUP comes when the terminal is closed: children in sessions of their own do not get it."""
    code = (
        "import signal, sys, time; "
        f"signal.signal({int(number)}, lambda *_: sys.exit(75)); time.sleep(60)"
    )
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), number))
    timer.start()
    assert run_processes([[sys.executable, "-c", code]] * 2, [{}] * 2) == 75


@pytest.mark.parametrize(
    "code", ["time.sleep(60)", "signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)"]
)
def test_a_signal_that_no_child_handles_reaches_the_parent(code: str) -> None:
    """A child that is starting has no handler yet, and a child that is exiting has lost it."""

    class OurHandlerError(Exception):
        pass

    def parent_handler(*_: object) -> None:
        raise OurHandlerError

    before = signal.signal(signal.SIGTERM, parent_handler)
    try:
        timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(OurHandlerError):
            run_processes(
                [[sys.executable, "-c", f"import signal, sys, time; {code}"]] * 2, [{}] * 2
            )
        assert signal.getsignal(signal.SIGTERM) is parent_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_child_starts_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was started while the signal arrived gets it too."""
    real, started = subprocess.Popen, []

    def popen(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        child = real(*words, **options)
        started.append(child)
        os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        run_processes([["bash", "-c", "sleep 60"]] * 2, [{}] * 2)
    assert [child.returncode for child in started] == [-signal.SIGINT]


@pytest.mark.parametrize("ranks", [False, True])
def test_ctrl_c_during_the_start_of_python(
    ranks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the blocked signal, Python would die in its module `site` with code 1, which no
    shell takes for Ctrl-C.
    """
    slow = "import pathlib, time\npathlib.Path(__file__).with_name('on').touch()\ntime.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["--version"]
    command = (
        ["bash", str(LAUNCHER), "--ranks", "2", *words]
        if ranks
        else [*module_command("pocl_ds.cli.main"), *words]
    )

    def press_ctrl_c() -> None:
        while not (tmp_path / "on").exists():
            time.sleep(0.01)
        time.sleep(2.6 if ranks else 0.3)  # the launcher asks Python for a port first
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        run_process(command)
    presser.join()
    output = capfd.readouterr()
    assert "pocl_ds" not in output.out, "the command must stop before it prints"
    assert ranks or not output.err


def test_children_ignore_a_signal_that_the_parent_ignores() -> None:
    """A shell starts background jobs with Ctrl-C ignored; the running step must not end there."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = (
            "import os, signal, sys; os.kill(os.getppid(), 2); os.kill(os.getpid(), 2); sys.exit(5)"
        )
        assert run_process([sys.executable, "-c", code]) == 5
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_child_raises_interrupted() -> None:
    with pytest.raises(
        Interrupted, match="killed by SIGKILL, (often )?because memory ran out"
    ) as exc_info:
        run_processes([[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]], [{}])
    assert exc_info.value.exit_code == 137
