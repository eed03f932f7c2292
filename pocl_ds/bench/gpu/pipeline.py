"""Part `pipeline`: `pocl run` from data to report with two random models, and the seconds of each
step. `transformers` generates, since starting vLLM in several steps would take most of the time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pocl_ds.bench.gpu.random_run import make_tokenizer, write_random_model, write_samples
from pocl_ds.bench.gpu.rows import Row, RowWriter
from pocl_ds.config import ReportConfig
from pocl_ds.config.yaml_io import dump_yaml
from pocl_ds.report.run_summary import read_run_summary
from pocl_ds.resources import module_command
from pocl_ds.runtime import distributed
from pocl_ds.workflow.run_dir import RunDirectory

SEED = 42


def recipe(folder: Path, *, samples: int, held_out: int, batch_size: int, tokens: int) -> Any:
    """The recipe of the run. tokens: that a response may have."""
    generation = {"backend": "transformers", "max_num_seqs": batch_size}
    return {
        "name": "gpu-pipeline",
        "seed": SEED,
        "data": {
            "source": str(folder / "samples.jsonl"),
            "max_train_samples": samples,
            "max_validation_samples": held_out,
            "max_test_samples": held_out,
        },
        "prompt": {"template": "alpaca", "max_prompt_tokens": 512, "max_length": 768},
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")},
        "score": {"generation": generation, "max_new_tokens": tokens},
        "curriculum": {"num_subsets": 2, "epochs_per_stage": 1},
        "loss": {"name": "srkl"},
        "train": {
            "batch_size": batch_size,
            "micro_batch_size": batch_size,
            "validate_max_samples": held_out,
        },
        "evaluate": {
            "generation": generation,
            "models": ["student"],
            "seeds": [10],
            "max_new_tokens": tokens,
        },
        "launch": {"ranks": 1},
    }


def main(rows: RowWriter) -> None:
    """Write a row for each step of the run, and one for all of it."""
    on_gpu = distributed.device_type() == "cuda"
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as name:
        folder = Path(name)
        write_samples(folder / "samples.jsonl", 700 if on_gpu else 60)
        tokenizer = make_tokenizer(folder / "samples.jsonl", 2048 if on_gpu else 300)
        sizes = {"teacher": (24, 1536), "student": (12, 768)}
        if not on_gpu:
            sizes = {"teacher": (2, 64), "student": (1, 64)}
        for seed, (role, (layers, width)) in enumerate(sizes.items()):
            write_random_model(folder / role, tokenizer, layers=layers, width=width, seed=seed)
        tree = recipe(
            folder,
            samples=512 if on_gpu else 16,
            held_out=32 if on_gpu else 4,
            batch_size=64 if on_gpu else 4,
            tokens=48 if on_gpu else 4,
        )
        (folder / "recipe.yaml").write_text(dump_yaml(tree))
        rows.measure({"name": "pocl run"}, lambda: run_recipe(folder, rows))


def run_recipe(folder: Path, rows: RowWriter) -> Row:
    """Run the recipe in a folder, and write the seconds of the steps that finished."""
    run, start = folder / "run", time.monotonic()
    command = [*module_command("pocl_ds.cli.main"), "run", str(folder / "recipe.yaml")]
    code = subprocess.run([*command, "--run-dir", str(run)]).returncode
    seconds = time.monotonic() - start
    summary = read_run_summary(RunDirectory(run), ReportConfig(), seed=SEED, window=1)
    for cost in summary.step_costs:
        rows.write({"name": cost.step, "duration": cost.seconds, "note": ""})
    if code:
        raise RuntimeError(f"pocl run ended with exit code {code}; its messages are in the log")
    return {"duration": seconds, "note": "with the start of every process"}


if __name__ == "__main__":
    main(RowWriter(Path(sys.argv[1])))
