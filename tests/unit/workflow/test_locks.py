"""Locks: who holds one, and that no child does."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.locks import LockTakenError, hold_lock
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import lock_run_directory

EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB


def test_the_message_names_process_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "a-secret-of-this-process")
    monkeypatch.setattr(
        sys, "argv", ["/x/main.py", "run", "--run-dir", "a b", "a-secret-of-this-process"]
    )
    run = RunDirectory(tmp_path / "run")
    host = os.uname().nodename
    expected = (
        rf"in use by process {os.getpid()} on {host} \(pocl run --run-dir 'a b' \*\*\*\): wait"
    )
    with (
        lock_run_directory(run),
        pytest.raises(ArtifactError, match=expected),
        lock_run_directory(run),
    ):
        pass


def test_a_holder_that_wrote_nothing_is_another_process(tmp_path: Path) -> None:
    """Its disk was full."""
    path = tmp_path / ".lock"
    with (
        hold_lock(path, EXCLUSIVE),
        pytest.raises(LockTakenError, match="another pocl process"),
    ):
        path.write_text("")
        with hold_lock(path, EXCLUSIVE):
            pass


def test_no_child_holds_the_lock(tmp_path: Path) -> None:
    """Workers of a killed process held the run directory until somebody killed them by hand."""
    path = tmp_path / ".lock"
    read_end, write_end = os.pipe()
    child_read_end, child_write_end = os.pipe()
    with hold_lock(path, EXCLUSIVE):
        started = subprocess.Popen(["sleep", "60"], close_fds=False)
        forked = os.fork()
        if forked == 0:
            os.close(write_end)
            os.write(child_write_end, b"1")  # it has started
            os.read(read_end, 1)  # until the parent has closed its end
            os._exit(0)
        os.read(child_read_end, 1)
    try:
        with hold_lock(path, EXCLUSIVE):
            assert os.waitpid(forked, os.WNOHANG) == (0, 0), "the child must still be there"
    finally:
        for handle in (read_end, write_end, child_read_end, child_write_end):
            os.close(handle)
        os.waitpid(forked, 0)
        started.kill()
        started.wait()


def test_a_worker_that_ends_does_not_release_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with hold_lock(path, EXCLUSIVE):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(LockTakenError), hold_lock(path, EXCLUSIVE):
            pass
