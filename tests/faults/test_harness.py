"""A few kills in CI; `python tests/faults/harness.py --kills 50` prints the full table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_equal() -> None:
    command = [
        sys.executable,
        str(Path(__file__).with_name("harness.py")),
        "--kills",
        "3",
        "--seed",
        "1",
    ]
    process = subprocess.run(command, text=True, capture_output=True, timeout=840)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    assert "0 of them with another result" in process.stdout
