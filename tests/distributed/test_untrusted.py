"""DeepSpeed's own checkpoints are read with nothing but data allowed; one that a stranger changed
is refused.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from command_line import ROOT


def test_a_checkpoint_of_a_stranger(tmp_path: Path) -> None:
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
    done = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "POCL_PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "read as data" in done.stdout
