"""A rank that differs from the others is named within seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, environment

from pocl_ds.errors import EXIT_HANG

EXPECTED = {
    "skip": (2, ("rank 1 differs from the other ranks", "micro-batches 2 instead of 3")),
    "recipe": (2, ("rank 1 differs from the other ranks", "fingerprint 'other' instead of 'one'")),
    "sleep": (EXIT_HANG, ("rank 0 made no progress for", "stacks-rank-0.txt")),
    "die": (9, ("rank 1 failed first, with exit code 9",)),
    "kill": (137, ("rank 0 lost the connection to another rank (Connection ", "rank 1 on ")),
}


@pytest.mark.parametrize("fault", EXPECTED)
def test_fault(fault: str, tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path) -> None:
    command = [
        "bash",
        str(ROOT / "launch" / "train.sh"),
        "--ranks",
        "2",
        "--threads",
        "1",
        "--module",
        "fault_worker",
        fault,
        str(tiny_llama_untied),
        str(tiny_llama),
        str(tmp_path / "run"),
    ]
    start = time.monotonic()
    process = subprocess.run(
        command,
        text=True,
        capture_output=True,
        timeout=200,
        env={
            **environment(),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(tmp_path / "logs"),
            "POCL_KILL_GRACE": "3",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        },
    )
    code, parts = EXPECTED[fault]
    assert process.returncode == code, (process.returncode, process.stderr[-3000:])
    for part in parts:
        assert part in process.stderr, process.stderr[-3000:]
    assert fault not in ("die", "kill") or "Traceback" not in process.stderr
    assert time.monotonic() - start < 120
    if fault == "sleep":
        stacks = {
            rank: (tmp_path / "run" / "train" / "logs" / f"stacks-rank-{rank}.txt").read_text()
            for rank in (0, 1)
        }
        # Only the stack of the sleeping rank shows the function that sleeps.
        assert "faulty_micro_batches" in stacks[1] and "faulty_micro_batches" not in stacks[0]
