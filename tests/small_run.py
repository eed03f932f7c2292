"""The time of a whole `pocl run` of two-layer models on 64 samples, two ranks, vLLM for scoring and
evaluation: nearly all of it is the start of processes.

    python tests/small_run.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny_models
from tiny_runs import write_recipe

LAUNCHER = Path(__file__).resolve().parents[1] / "launch" / "pocl.py"


def main() -> None:
    """Run it once, and print the seconds of each step and of all of them."""
    vllm = {"generation": {"backend": "vllm", "max_num_seqs": 16}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(
            folder,
            tiny_models.llama(folder / "teacher", layers=2),
            tiny_models.llama(folder / "student", layers=2),
            max_train_samples=64,
            score={**vllm, "shards": 1},
            evaluate=vllm,
            curriculum={"num_subsets": 4, "epochs_per_stage": 2},
        )
        words = ["pocl_ds.cli.main", "run", str(recipe), "--run-dir", str(folder / "run")]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(LAUNCHER), *words], capture_output=True, text=True, check=False
        )
    seconds, usage = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    for line in done.stderr.splitlines():
        if "finished in" in line:
            print(line)
    print(f"{seconds:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s of processor time")


if __name__ == "__main__":
    main()
