"""Copies on a node's disk that the last process removes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, environment

from pocl_ds.workflow.files import file_digest
from pocl_ds.workflow.local_copy import copy_files, hold_copy
from pocl_ds.workflow.locks import hold_lock


def hold_in_process(target: Path) -> subprocess.Popen[str]:
    """Hold a copy in its own process until its input ends; it has printed a line by then."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from pocl_ds.workflow.local_copy import hold_copy\n"
        "with hold_copy(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def make_copy(source: Path, target: Path) -> None:
    source.mkdir(exist_ok=True)
    (source / "weights").write_bytes(b"12345")
    files = {"weights": file_digest(source / "weights")}
    copy_files(source, files, target, name="model", field="f", remedy="r")


def test_the_last_process_of_a_node_removes_the_copy(tmp_path: Path) -> None:
    target = tmp_path / "scratch" / "me" / "model-1"
    with hold_copy(target):
        make_copy(tmp_path / "source", target)
        other = hold_in_process(target)
    assert (target / "weights").read_bytes() == b"12345", "another process reads it"
    other.communicate(timeout=60)
    assert list(target.parent.iterdir()) == []
    assert (tmp_path / "source" / "weights").read_bytes() == b"12345"


def test_a_copy_of_a_killed_process_is_used_and_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model-1"
    process = hold_in_process(target)
    make_copy(tmp_path / "source", target)
    process.kill()
    process.wait()
    written = (target / "weights").stat().st_mtime_ns
    with hold_copy(target):
        make_copy(tmp_path / "source", target)
        assert (target / "weights").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_copy_is_removed_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "model-1"
    with pytest.raises(ZeroDivisionError), hold_copy(target):
        make_copy(tmp_path / "source", target)
        raise ZeroDivisionError
    assert not target.exists()


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights").write_bytes(b"mine")
    (tmp_path / "model-1").symlink_to(tmp_path / "other")
    with hold_copy(tmp_path / "model-1"):
        pass
    assert (tmp_path / "other" / "weights").read_bytes() == b"mine"


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path: Path) -> None:
    """Otherwise one process would hold a file that no other one can see."""
    lock = tmp_path / "lock"
    with hold_lock(lock, fcntl.LOCK_EX):
        waiting = subprocess.Popen(
            [
                *(sys.executable, "-c"),
                "import fcntl, sys\nfrom pathlib import Path\n"
                "from pocl_ds.workflow.locks import hold_lock\n"
                "path = Path(sys.argv[1])\n"
                "with hold_lock(path, fcntl.LOCK_EX): print(path.exists())",
                str(lock),
            ],
            env={**environment(), "PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
        )
        # It has opened the file when it waits for the lock.
        while not any(os.path.realpath(link) == str(lock) for link in _open_files(waiting.pid)):
            time.sleep(0.05)
        lock.unlink()
    assert waiting.communicate(timeout=60)[0] == "True\n"


def _open_files(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())
