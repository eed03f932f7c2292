"""The command `pocl` as a user starts it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLANTED = "PLANTEDplantedPLANTEDplanted"  # what no run may write or say
SECRETS = {
    name: f"{PLANTED}{name}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "JUDGE_KEY")
}


def environment() -> dict[str, str]:
    """This process's environment without what our own launchers set, and with secrets."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith("POCL_")
    } | SECRETS


def start(*words: str) -> subprocess.Popen[str]:
    """`pocl WORDS...`, running."""
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
    """`pocl WORDS...` to its end."""
    found = subprocess.run(
        [sys.executable, "-m", "pocl_ds.cli.main", *words],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=380,
        umask=0o022,
    )
    assert PLANTED not in found.stdout + found.stderr
    assert not check or found.returncode == 0, found.stderr[-3000:]
    return found
