"""Ranks that run several commands one after the other: starting a rank takes longer than training a
tiny model.

    launch/train.sh --ranks R --module several_commands COMMANDS.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from command_line import ROOT, environment

from pocl_ds.cli.main import main


def run_on_ranks(folder: Path, ranks: int, *commands: list[str]) -> None:
    """Run commands of `pocl`, each on these ranks. folder: for the launcher's files."""
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    command = ["bash", str(ROOT / "launch" / "train.sh"), "--ranks", str(ranks), "--threads", "1"]
    process = subprocess.run(
        [*command, "--module", "several_commands", str(path)],
        text=True,
        capture_output=True,
        timeout=380,
        env={
            **environment(),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(folder / "logs"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
    )
    assert process.returncode == 0, process.stderr[-3000:]


if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(words):
            sys.exit(code)
