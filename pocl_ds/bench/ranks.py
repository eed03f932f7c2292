"""Starts the ranks of a benchmark with launch/train.sh, like those of a training; each runs a
worker module of `pocl_ds.bench`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.errors import ResourceError
from pocl_ds.resources import LAUNCHER


def run_ranks(
    label: str, module: str, arguments: Sequence[str], result: Path, *, ranks: int, threads: int
) -> Any:
    """Run a worker on some ranks and return what rank 0 writes to `result` as JSON.

    Raises ResourceError if a rank fails.
    """
    command = ["bash", str(LAUNCHER), "--module", module]
    command += ["--ranks", str(ranks), "--threads", str(threads), *arguments]
    environment = {"POCL_PYTHON": sys.executable, "POCL_LOG_DIR": str(result.parent / "logs")}
    return run_worker(label, command, result, environment)


def run_worker(
    label: str, command: Sequence[str], result: Path, environment: Mapping[str, str]
) -> Any:
    """Run a command and return what it writes to `result` as JSON.

    Raises ResourceError if the command fails.
    """
    result.unlink(missing_ok=True)
    process = subprocess.run(
        command, env={**os.environ, **environment}, text=True, capture_output=True
    )
    if process.returncode or not result.is_file():
        output = process.stderr.strip()[-400:] or process.stdout[-400:]
        raise ResourceError(f"{label} failed with exit code {process.returncode}: {output}")
    return json.loads(result.read_text())
