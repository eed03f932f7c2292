"""Ranks of a benchmark: started by launch/train.sh like those of a training, each with a worker
module of `pocl_ds.bench`.
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
    """Run a worker on some ranks and return what rank 0 wrote to `result`, JSON. Raises
    ResourceError where they fail.
    """
    command = [
        "bash",
        str(LAUNCHER),
        "--module",
        module,
        "--ranks",
        str(ranks),
        "--threads",
        str(threads),
        *arguments,
    ]
    return run_worker(
        label,
        command,
        result,
        {"POCL_PYTHON": sys.executable, "POCL_LOG_DIR": str(result.parent / "logs")},
    )


def run_worker(
    label: str, command: Sequence[str], result: Path, environment: Mapping[str, str]
) -> Any:
    """Run a command that writes `result`, JSON, and return that."""
    result.unlink(missing_ok=True)
    done = subprocess.run(
        command, env={**os.environ, **environment}, text=True, capture_output=True
    )
    if done.returncode or not result.is_file():
        raise ResourceError(
            f"{label} ended with code {done.returncode}: "
            f"{done.stderr.strip()[-400:] or done.stdout[-400:]}"
        )
    return json.loads(result.read_text())
