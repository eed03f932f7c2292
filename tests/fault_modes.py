"""The modes in which the fault harness kills runs: small recipes that differ in what a resume has
to restore.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
from tiny_runs import write_recipe

# The sections of the recipe that each mode changes.
MODES: dict[str, dict[str, dict[str, Any]]] = {
    "base": {"baseline": {"enabled": True}},
    # Without healing: the test that runs every day has this mode, and should be short.
    "async_save": {
        "student": {"heal_steps": 0},
        "train": {"checkpoint": {"every_n_steps": 3, "async_save": True}},
    },
    "rescoring": {
        "ranking": {"strategy": "random"},
        "curriculum": {
            "rescoring": {"difficulty": "kd_loss", "from_stage": 1, "shards": 3, "share": 0.5},
            "sample_weights": {"name": "loss"},
        },
    },
    "own_ranks": {"teacher": {"placement": "own_ranks", "ranks": 1}},
    "sequence_parallel": {"train": {"sequence_parallel_size": 2}},
    "cached_hidden_states": {
        "teacher": {"mode": "cached_hidden_states"},
        "teacher_cache": {"shards": 3},
    },
    "on_policy": {
        "policy": {
            "name": "mixture",
            "shares": {"data": 0.3, "student": 0.4, "teacher": 0.3},
            "rollout_backend": "transformers",
            "max_new_tokens": 6,
        },
        "curriculum": {"sft_ratio": [0, 0]},
    },
}


def write_mode_recipe(folder: Path, mode: str) -> Path:
    """Write the recipe of a mode: three stages with dropout, a short healing, and a checkpoint
    every third optimizer step.
    """
    changes: dict[str, dict[str, Any]] = {
        "student": {"heal_steps": 4, "dropout": 0.1},
        "score": {"shards": 4},
        "curriculum": {"epochs_per_stage": 3},
    }
    for section, fields in MODES[mode].items():
        changes[section] = {**changes.get(section, {}), **fields}
    return write_recipe(
        folder,
        tiny_models.llama(folder / "teacher", tied=False, seed=1),
        tiny_models.llama(folder / "student"),
        max_train_samples=32,
        **changes,
    )
