"""Hang detection by a process that only sometimes has work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pocl_ds.errors import EXIT_HANG
from pocl_ds.runtime.process_exit import JOB_RANK

PROGRAM = """
import pathlib, sys, time
from pocl_ds.training.watchdog import Watchdog
with Watchdog(pathlib.Path(sys.argv[1]), 0.3) as watchdog:
    watchdog.pause()
    time.sleep(1.5)
    print("waited for work", flush=True)
    watchdog.reset()
    time.sleep(20)
"""


def test_only_the_time_of_work_counts(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**os.environ, "RANK": "0", JOB_RANK: "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == EXIT_HANG, process.stderr
    assert "waited for work" in process.stdout
    assert "rank 2 made no progress" in process.stderr
    assert "line 9" in (tmp_path / "stacks-rank-2.txt").read_text()
