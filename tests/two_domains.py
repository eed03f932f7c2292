"""Three models and samples of two domains, for runs with teachers by domain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models

from pocl_ds.cli.main import main


def write_models_and_data(folder: Path, samples: int) -> Path:
    """Write student, first and second, and data.jsonl, whose field `kind` is math or chat."""
    for name, seed in (("student", 0), ("first", 1), ("second", 2)):
        tiny_models.llama(folder / name, layers=1, seed=seed)
    with (folder / "data.jsonl").open("w") as stream:
        for i in range(samples):
            record = {
                "instruction": f"Say {i} and {i * i % 17}.",
                "output": f"It is {i} " * (1 + i % 4),
                "kind": "math" if i % 3 else "chat",
            }
            stream.write(json.dumps(record) + "\n")
    return folder


def run_here(step: str, run: Path, *words: str) -> int:
    """Run a step as its only rank, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        return main([step, "--run-dir", str(run), *words])
