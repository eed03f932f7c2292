"""A few kills in CI; `python tests/faults/harness.py --mode all` prints the full table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fault_modes import MODES


def kill_and_compare(mode: str, kills: int) -> None:
    harness = Path(__file__).with_name("harness.py")
    command = [sys.executable, str(harness), "--mode", mode, "--kills", str(kills), "--seed", "1"]
    process = subprocess.run(command, text=True, capture_output=True, timeout=840)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert f"{kills} kills, 0 of them" in process.stdout


def test_killed_runs_end_equal() -> None:
    kill_and_compare("async_save", kills=2)


@pytest.mark.weekly
@pytest.mark.parametrize("mode", MODES)
def test_killed_runs_of_every_mode_end_equal(mode: str) -> None:
    kill_and_compare(mode, kills=4)
