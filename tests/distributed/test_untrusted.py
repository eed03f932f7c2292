"""DeepSpeed's checkpoints are loaded as data only; a checkpoint that contains code is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from command_line import ROOT


def test_a_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [
        "bash",
        str(ROOT / "launch" / "train.sh"),
        "--ranks",
        "1",
        "--threads",
        "1",
        "--module",
        "untrusted_worker",
    ]
    process = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "POCL_PYTHON": sys.executable},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "read as data" in process.stdout
