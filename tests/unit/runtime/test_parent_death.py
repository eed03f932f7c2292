"""No process of a run outlives the one that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pocl_ds.resources import LAUNCHER, ROOT, module_command
from pocl_ds.runtime.parent_death import bound_command

# What a killed process leaves behind: a forked worker, as those of DeepSpeed's conversion of a
# checkpoint, and one that was started as a new program, as those of vLLM.
FAMILY = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path

folder = Path(sys.argv[1])

def work():
    (folder / f"{os.getpid()}.forked").touch()
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=work).start()
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / f"{started.pid}.started").touch()
    (folder / f"{os.getpid()}.child").touch()
    time.sleep(60)
"""
PARENT = """
import sys
from pocl_ds.workflow.processes import run_process
sys.exit(run_process(sys.argv[1:]))
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command of `launch/pocl.py` that starts workers and waits."""
    (tmp_path / "family.py").write_text(textwrap.dedent(FAMILY))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    return ["family", str(tmp_path)]


def members(folder: Path, *kinds: str) -> dict[str, int]:
    """The process of each kind, once all of them have started."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pids = {
            path.suffix[1:]: int(path.stem) for path in folder.glob("*.*") if path.stem.isdigit()
        }
        if set(kinds) <= set(pids):
            return pids
        time.sleep(0.05)
    raise AssertionError("the processes did not start")


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived the one that started it"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_and_its_forked_workers_die_with_the_parent(
    family: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PARENT, *module_command(family[0]), family[1]]
    parent = subprocess.Popen(command, start_new_session=True)
    pids = members(tmp_path, "child", "forked", "started")
    parent.kill()
    parent.wait()
    try:
        wait_until_gone(pids["child"], pids["forked"])
    finally:
        os.kill(pids["started"], signal.SIGKILL)  # vLLM's own workers watch their parent


def test_a_killed_child_leaves_no_worker_behind(family: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, *module_command(family[0]), family[1]]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    pids = members(tmp_path, "child", "forked", "started")
    os.kill(pids["child"], signal.SIGKILL)
    parent.wait(timeout=20)
    wait_until_gone(*pids.values())


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_ranks_and_their_workers_die_with_the_launcher(
    victim: str, family: list[str], tmp_path: Path
) -> None:
    launcher = subprocess.Popen(
        ["bash", str(LAUNCHER), "--ranks", "1", "--module", *family],
        env={**os.environ, "POCL_PYTHON": sys.executable, "POCL_LOG_DIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    pids = members(tmp_path, "child", "forked", "started")
    if victim == "launcher":
        launcher.kill()
        gone = [pids["child"], pids["forked"]]
    else:
        os.kill(pids["child"], signal.SIGKILL)
        gone = [*pids.values()]
    try:
        launcher.wait(timeout=20)
        wait_until_gone(*gone)
    finally:
        if victim == "launcher":
            os.kill(pids["started"], signal.SIGKILL)


def test_a_command_whose_parent_is_gone_does_not_start() -> None:
    words = bound_command(["echo", "started"])
    words[4] = str(os.getppid())
    process = subprocess.run(words, capture_output=True)
    assert (process.returncode, process.stdout) == (-signal.SIGKILL, b"")


def test_a_bound_command_has_the_signals_of_a_plain_one() -> None:
    """Python ignores SIGPIPE for itself; a shell that inherits that does not end with its pipe."""
    show = ["grep", "SigIgn", "/proc/self/status"]
    plain = subprocess.run(show, capture_output=True, check=True).stdout
    assert subprocess.run(bound_command(show), capture_output=True, check=True).stdout == plain
