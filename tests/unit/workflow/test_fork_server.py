"""Steps in forked processes: exit codes, signals, and ends of the server. `timeit` is a program
that runs any code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_ds.errors import Interrupted
from pocl_ds.workflow.fork_server import ForkServer
from pocl_ds.workflow.shared_imports import SHARED_IMPORTS

READY = "import os, pathlib, signal, time; ready = lambda: pathlib.Path({!r}).touch(); "


def wait_for_end(file: Path) -> None:
    """Wait until the process whose id a file holds is gone, or is a zombie."""
    stat, deadline = Path("/proc", file.read_text().strip(), "stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as opened:
        yield opened


def run_code(server: ForkServer, code: str) -> int:
    return server.run("timeit", ["-n", "1", "-r", "1", code])


def process_id(server: ForkServer) -> int:
    assert server._process is not None
    return server._process.pid


def signal_when(path: Path, number: int, target: int | None = None) -> None:
    """Send a signal, to this process by default, as soon as a file exists."""

    def send() -> None:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid() if target is None else target, number)

    threading.Thread(target=send, daemon=True).start()


def test_each_program_has_a_process_and_an_exit_code(server: ForkServer, tmp_path: Path) -> None:
    out = tmp_path / "pids"
    code = (
        f"import os; print(os.getpid(), os.getppid(), os.getsid(0), file=open({str(out)!r}, 'a'))"
    )
    assert run_code(server, code) == 0
    assert run_code(server, f"{code}; os._exit(3)") == 3
    assert server.run("pocl_ds.cli.main", ["no-such-command"]) == 2
    first, second = (line.split() for line in out.read_text().splitlines())
    assert first[0] != second[0] and first[0] == first[2], "each has its own session"
    assert first[1] == second[1] == str(process_id(server))


def test_a_child_has_the_imports_and_the_environment(server: ForkServer, tmp_path: Path) -> None:
    out = tmp_path / "modules"
    code = (
        f"import os, sys; print('torch' in sys.modules, os.environ['POCL_WITHIN'], "
        f"file=open({str(out)!r}, 'w'))"
    )
    assert server.run("timeit", ["-n", "1", "-r", "1", code], ["models"]) == 0
    assert out.read_text().split() == ["True", "1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_reaches_the_child(server: ForkServer, tmp_path: Path, number: int) -> None:
    ready = tmp_path / "ready"
    signal_when(ready, number)
    handle = f"signal.signal({int(number)}, lambda *_: os._exit(75)); ready(); time.sleep(60)"
    assert run_code(server, READY.format(str(ready)) + handle) == 75
    assert run_code(server, "pass") == 0, "the server goes on"


def test_a_signal_that_the_child_does_not_handle_reaches_the_parent(
    server: ForkServer, tmp_path: Path
) -> None:
    class OurHandlerError(Exception):
        pass

    def parent_handler(*_: object) -> None:
        raise OurHandlerError

    before = signal.signal(signal.SIGTERM, parent_handler)
    try:
        ready = tmp_path / "ready"
        signal_when(ready, signal.SIGTERM)
        with pytest.raises(OurHandlerError):
            run_code(server, READY.format(str(ready)) + "ready(); time.sleep(60)")
        assert signal.getsignal(signal.SIGTERM) is parent_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_killed_child_raises_interrupted(server: ForkServer) -> None:
    with pytest.raises(Interrupted, match="killed by SIGKILL") as caught:
        run_code(server, "import os; os.kill(os.getpid(), 9)")
    assert caught.value.exit_code == 137
    assert run_code(server, "pass") == 0


def test_a_failed_child_leaves_no_worker(server: ForkServer, tmp_path: Path) -> None:
    out = tmp_path / "pid"
    code = (
        "import os, subprocess; worker = subprocess.Popen(['sleep', '60']); "
        f"print(worker.pid, file=open({str(out)!r}, 'w')); os._exit(4)"
    )
    assert run_code(server, code) == 4
    wait_for_end(out)


def test_a_killed_server_takes_its_child_along(tmp_path: Path) -> None:
    with ForkServer() as server:
        assert run_code(server, "pass") == 0
        ready, out = tmp_path / "ready", tmp_path / "pid"
        signal_when(ready, signal.SIGKILL, process_id(server))
        code = f"print(os.getpid(), file=open({str(out)!r}, 'w')); ready(); time.sleep(60)"
        with pytest.raises(Interrupted, match="killed by SIGKILL"):
            run_code(server, READY.format(str(ready)) + code)
        wait_for_end(out)
        assert run_code(server, "pass") == 0, "another server starts"


def test_a_signal_during_the_imports_ends_the_server(capfd: pytest.CaptureFixture[str]) -> None:
    """There is no child yet that could handle it."""
    with ForkServer() as server:
        assert run_code(server, "pass") == 0
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.start()
        assert server.run("timeit", ["pass"], ["models"]) == 75
        assert "TERM: stopped" in capfd.readouterr().err
        assert run_code(server, "pass") == 0


def test_ctrl_c_during_the_imports_is_raised_by_the_run() -> None:
    """The server says nothing, and the parent handles the signal as its own."""
    with ForkServer() as server:
        assert run_code(server, "pass") == 0
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            server.run("timeit", ["pass"], ["models"])
        assert run_code(server, "pass") == 0


@pytest.mark.parametrize("name", [pytest.param("vllm", marks=pytest.mark.vllm), "models"])
def test_shared_imports_leave_nothing_that_a_fork_breaks(name: str) -> None:
    """No thread of Python, no state of a GPU, and no threads of OpenMP: a parallel operation in a
    child works.
    """
    assert name in SHARED_IMPORTS
    code = f"""
import os, sys, threading
from pocl_ds.workflow.shared_imports import SHARED_IMPORTS
SHARED_IMPORTS[{name!r}]()
import torch
assert {name!r} == "models" or "vllm" in sys.modules
assert threading.active_count() == 1 and not torch.cuda.is_initialized()
if (child := os.fork()) == 0:
    torch.set_num_threads(4)
    os._exit(0 if torch.ones(1000, 1000).mm(torch.ones(1000, 1000)).sum() == 1e9 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()[-2000:]


def test_a_child_that_lost_the_gpu_starts_python_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = "f'{os.getpid()} {\"torch\" in sys.modules}'"
    code = f"import os, sys; open({str(out)!r}, 'w').write({result})"
    program = (
        "import torch; from pocl_ds.compat import torch_private\n"
        "torch_private.is_gpu_lost_by_fork = lambda: True\n"
        "from pocl_ds.workflow.fork_server import run_program\n"
        f"run_program('timeit', ['-n', '1', '-r', '1', {code!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    assert process.wait(120) == 0
    assert out.read_text() == f"{process.pid} False"
