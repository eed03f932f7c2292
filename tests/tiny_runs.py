"""A complete run on tiny models: its recipe, its training records, and stopping it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import yaml
from command_line import start


def write_recipe(
    folder: Path,
    teacher: Path,
    student: Path,
    /,
    *,
    max_train_samples: int,
    **changes: dict[str, Any],
) -> Path:
    """Write data.jsonl with 90 samples and recipe.yaml to `folder`. changes: fields by section that
    replace the ones here.
    """
    with (folder / "data.jsonl").open("w") as stream:
        for i in range(90):
            record = {
                "instruction": f"Say {i} and {i * i % 17}.",
                "output": f"It is {i} " * (1 + i % 4),
            }
            stream.write(json.dumps(record) + "\n")
    small = {"backend": "transformers", "max_num_seqs": 16}
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "source": str(folder / "data.jsonl"),
            "test_fraction": 0.1,
            "validation_fraction": 0.1,
            "max_train_samples": max_train_samples,
        },
        "prompt": {"template": "chat", "max_prompt_tokens": 64, "max_length": 96},
        "teacher": {"model": str(teacher)},
        "student": {"model": str(student)},
        "score": {"generation": small, "max_new_tokens": 8, "shards": 2},
        "curriculum": {"num_subsets": 3, "epochs_per_stage": 2},
        "train": {
            "batch_size": 8,
            "micro_batch_size": 2,
            "lr": 1e-3,
            "checkpoint": {"every_n_steps": 3},
        },
        "evaluate": {"generation": small, "seeds": [1], "max_new_tokens": 8},
        "launch": {"ranks": 2, "threads_per_rank": 1},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def records(run: Path, training: str = "train", kind: str = "step") -> list[dict[str, Any]]:
    """The records of one kind in a training's metrics.jsonl."""
    lines = [
        json.loads(line) for line in (run / training / "metrics.jsonl").read_text().splitlines()
    ]
    return [line for line in lines if line["kind"] == kind]


def computed(run: Path, training: str = "train") -> list[dict[str, Any]]:
    """The values of each optimizer step that do not depend on time."""
    names = ("step", "loss", "kd_loss", "sft_loss", "loss_tokens", "sample_ids_digest", "grad_norm")
    return [{name: record[name] for name in names} for record in records(run, training)]


def stop_after(run: Path, step: int, *words: str) -> int:
    """Send TERM to a training after `step` optimizer steps; returns how many it finished."""
    process = start("train", "--run-dir", str(run), *words)
    metrics = run / "train" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=300)
    assert process.returncode == 75
    return len(records(run))
