"""Programs of models in the sandbox of real bubblewrap."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest

from pocl_ds.errors import ResourceError
from pocl_ds.evaluation import code_sandbox
from pocl_ds.evaluation.code_sandbox import check_sandbox, run_tests

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(autouse=True)
def sandbox() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    try:
        check_sandbox()
    except ResourceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        (RIGHT, None),
        ("import threading, socket, decimal, sqlite3\n" + RIGHT, None),
        ("print('x' * 100_000)\n" + RIGHT, None),
        ("open('/tmp/x', 'w').write('x')\n" + RIGHT, None),
        ("def add(a, b): return a - b", "failed (AssertionError: )"),
        ("def add(a, b) return a", "not valid Python (SyntaxError"),
        ("(" * 100_000, "not valid Python"),
        ("\ud800", "not valid Python"),
        ("def other(): pass", "failed (NameError"),
        ("import numpy", "failed (ModuleNotFoundError"),
        ("def f(): f()\nf()", "failed (RecursionError"),
        ("class Own(BaseException): pass\nraise Own", "failed (Own"),
        ("x = 'a' * (1 << 31)", "failed (MemoryError"),
        ("open('/tmp/x', 'wb').write(b'x' * (1 << 25))", "failed (OSError"),
    ],
)
def test_a_program_passes_or_says_why_not(program: str, fault: str | None) -> None:
    result = run_tests(program, TESTS)
    assert result is None if fault is None else result is not None and result.startswith(fault)


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        'import os\nos.write(3, b\'{"result": "", "error": ""}\')\nos._exit(0)',
        "import os\nfor _ in range(100_000): os.write(3, b'x' * 65536)",
    ],
)
def test_a_program_that_ends_before_its_tests_fails(program: str) -> None:
    assert run_tests(program, TESTS) == "ended early"


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(code_sandbox.LIMITS, "CPU", 1)
    fault = run_tests("while True: pass", TESTS)
    assert fault == "out of time (took more than 1 s of processor time)"
    monkeypatch.setattr(code_sandbox, "MAX_SECONDS", 1)
    start = time.monotonic()
    fault = run_tests("import time\ntime.sleep(600)", TESTS)
    assert fault == "out of time (took more than 1 s)" and time.monotonic() - start < 30


def test_processes_are_limited() -> None:
    fault = run_tests("import os\nfor _ in range(1000): os.fork() or os._exit(0)", TESTS)
    assert fault is not None
    spawn = (
        "import ctypes, os, time\n"
        "ctypes.CDLL(None).prctl(15, b'sandboxed-test')\n"  # the name of the process
        "for _ in range(1000):\n  if os.fork() == 0: time.sleep(60)"
    )
    assert "BlockingIOError" in str(run_tests(spawn, TESTS))
    for name in Path("/proc").glob("[0-9]*/comm"):  # they ended with the program
        with contextlib.suppress(OSError):
            assert name.read_text() != "sandboxed-test\n"


def test_nothing_of_the_user_is_within_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    tmp_path.chmod(0o777)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    for program in (
        f"open({str(secret)!r})",
        f"open({str(Path.home() / 'x')!r}, 'w')",
        f"open({str(tmp_path / 'x')!r}, 'w')",
        "open('/etc/passwd')",
        "open('/usr/x', 'w')",
        "import os; os.environ['HF_TOKEN']",
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        f"import os; os.kill({os.getpid()}, 9)",
        "import os; os.chroot('/tmp')",
        "import os; os.setuid(0) if os.getuid() else open('/etc/x', 'w')",
    ):
        assert str(run_tests(program, TESTS)).startswith("failed ("), program
    assert os.listdir(tmp_path) == ["secret"]


def test_a_machine_without_a_sandbox_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ResourceError, match="install the package bubblewrap"):
        check_sandbox()
    monkeypatch.undo()
    monkeypatch.setattr(code_sandbox, "PYTHON", ["/no/such/python"])
    with pytest.raises(ResourceError, match="does not start here .*no/such/python"):
        check_sandbox()
