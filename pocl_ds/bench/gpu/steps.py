"""Part `steps-PAIR`: optimizer steps of distillation at real shapes with random weights, beside
SFT, plain full logits and TRL's GKD trainer.

On a GPU each contender has its own process, which imports, and computes the estimate, while
the one before it measures. A dry run measures all of them in one process. This process imports no
torch, so as to start at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pocl_ds.bench.gpu.rows import RowWriter, read_rows
from pocl_ds.resources import module_command

WORKER = "pocl_ds.bench.gpu.steps_worker"
LIMIT_SECONDS = 40  # of a contender on a GPU, so that the others have their turn
# Variant -> label, in the order of their importance.
CONTENDERS = {
    "zero3": "pocl, online teacher",
    "zero3+cached": "pocl, cached hidden states",
    "zero3+sft": "pocl, SFT",
    "trl": "TRL's GKD trainer, lmbda=0",
    "full": "plain full logits",
}


def main(rows: RowWriter, pair: str) -> None:
    """Write a row for each contender."""
    on_gpu = os.environ.get("DS_ACCELERATOR") != "cpu"
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as name:
        folder = Path(name)
        groups = [[variant] for variant in CONTENDERS] if on_gpu else [[*CONTENDERS]]
        limit = LIMIT_SECONDS if on_gpu else None
        upcoming = start_worker(rows.path, folder, pair, groups[0])
        for number, variants in enumerate(groups):
            worker = upcoming
            for following in groups[number + 1 : number + 2]:
                upcoming = start_worker(rows.path, folder, pair, following)
            if reason := finish_worker(worker, limit):
                write_missing(rows, variants, reason)


def start_worker(
    rows_path: Path, folder: Path, pair: str, variants: Sequence[str]
) -> subprocess.Popen[str]:
    """Start a process that prepares what needs no GPU, and measures when it reads a line."""
    command = [*module_command(WORKER), str(rows_path), str(folder), pair, *variants]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=dict(os.environ))


def finish_worker(worker: subprocess.Popen[str], limit: float | None) -> str | None:
    """Let a process measure. Returns why it did not end well, or None."""
    start = time.monotonic()
    try:
        worker.communicate("go\n", timeout=limit)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return f"stopped after {time.monotonic() - start:.0f} s"
    return f"exit code {worker.returncode}" if worker.returncode else None


def write_missing(rows: RowWriter, variants: Sequence[str], reason: str) -> None:
    """Write a row for each contender that has none because its process ended."""
    written = {row["name"] for row in read_rows(rows.path)}
    for variant in variants:
        if CONTENDERS[variant] not in written:
            rows.write({"name": CONTENDERS[variant], "error": reason})


if __name__ == "__main__":
    main(RowWriter(Path(sys.argv[1])), sys.argv[2])
