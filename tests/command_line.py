"""The command `pocl` in a separate process, as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLANTED = "PLANTEDplantedPLANTEDplanted"  # must not appear in any output or file
TWO_RANKS = ("bash", str(ROOT / "launch" / "train.sh"), "--ranks", "2", "--threads", "1")
SECRETS = {
    name: f"{PLANTED}{name}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "JUDGE_KEY")
}


def environment() -> dict[str, str]:
    """This process's environment with secrets, and without the variables of our launchers."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith("POCL_")
    } | SECRETS


def start(*words: str) -> subprocess.Popen[str]:
    """Start `pocl WORDS...`."""
    return subprocess.Popen(
        [sys.executable, "-m", "pocl_ds.cli.main", *words],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def pocl(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `pocl WORDS...` to its end."""
    process = subprocess.run(
        [sys.executable, "-m", "pocl_ds.cli.main", *words],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=380,
        umask=0o022,
    )
    assert PLANTED not in process.stdout + process.stderr
    assert not check or process.returncode == 0, process.stderr[-3000:]
    return process


def run_module(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> None:
    """Run a module of tests/ in a process of its own: training leaves process groups behind."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [*launcher, "--module"] if launcher else [sys.executable, "-m"]
    process = subprocess.run(
        [*command, name, *arguments],
        env={**environment(), "POCL_PYTHON": sys.executable, "PYTHONPATH": paths},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
