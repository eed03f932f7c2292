"""The times of commands that start no process: help, a dry run, the list of 1,000 runs, and the
report of a run with 100,000 samples, 20,000 optimizer steps and 20,000 evaluated items.

    python tests/everyday_commands.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from synthetic_run import SyntheticRun

from pocl_ds.config import ReportConfig
from pocl_ds.report.build import build_report

LAUNCHER = Path(__file__).resolve().parents[1] / "launch" / "pocl.py"
ROUNDS = 5
RECIPE = "name: x\nstudent: {model: s}\nteacher: {model: t}\ndata: {source: x.jsonl}\n"
WORDS = " ".join(["word"] * 60)


def main() -> None:
    """Print the seconds of each command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = SyntheticRun(folder / "large")
        large.data(100_000, [WORDS])
        large.plan(100_000)
        large.train(20_000)
        large.ranking(100_000)
        large.evaluation(items=10_000, benchmarks=("test", "unni"))
        for number in range(1000):
            run = SyntheticRun(folder / "runs" / str(number))
            run.plan()
            run.train(600, finished=number % 2 == 0)
            (run.run.path / "recipe.yaml").write_text(RECIPE)
        dry_run = ("run", "opt-2.7b-to-350m", "--dry-run", "--run-dir", str(folder / "x"))
        for words in (("--help",), dry_run, ("list", str(folder / "runs"))):
            measure(f"pocl {words[0]}", lambda words=words: pocl(*words))  # type: ignore[misc]
        settings = {"recipe_yaml": large.recipe, "fingerprint": "f"}
        measure("report", lambda: build_report(large.run, ReportConfig(), **settings))


def pocl(*words: str) -> None:
    """Run a command of `pocl`."""
    command = [sys.executable, str(LAUNCHER), "pocl_ds.cli.main", *words]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def measure(label: str, work: Callable[[], object]) -> None:
    """Do it some times, and print the median of the seconds, the smallest and the largest."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.monotonic()
        work()
        seconds.append(time.monotonic() - start)
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    print(f"{label}: {middle:.2f} s ({low:.2f}..{high:.2f})", flush=True)


if __name__ == "__main__":
    main()
