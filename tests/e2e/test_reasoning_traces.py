"""The recipe for reasoning traces, with tiny models and traces of 8,000 tokens, from the data to
the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import tiny_models
from command_line import pocl
from tiny_runs import records

POSITIONS = 16384


def model(folder: Path, **fields: object) -> Path:
    path = tiny_models.llama(folder, **fields)  # type: ignore[arg-type]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    return path


def trace(number: int, random: Random) -> dict[str, object]:
    """A problem, a thought of several thousand words and a short answer."""
    words = [f"{random.randrange(10)} + {random.randrange(10)}" for _ in range(1200 + 20 * number)]
    content = f"<think>\n{'. '.join(words)}.\n</think>\n\nIt is {number}."
    return {
        "messages": [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": content},
        ]
    }


@pytest.mark.weekly
def test_from_traces_to_the_report(tmp_path: Path) -> None:
    random, data, run = Random(0), tmp_path / "traces.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(trace(n, random)) + "\n" for n in range(24)))
    words = [
        f"data.source={data}",
        "data.max_train_samples=null",
        "data.test_fraction=0.1",
        "data.validation_fraction=0.1",
        f"teacher.model={model(tmp_path / 'teacher', layers=3, tied=False, seed=1)}",
        f"student.model={model(tmp_path / 'student', layers=2)}",
        "prompt.max_prompt_tokens=256",
        "score.max_new_tokens=32",
        "score.generation.backend=transformers",
        "score.shards=1",
        "curriculum.num_subsets=2",
        "loss.thought_weight=0.5",
        "train.batch_size=4",
        "train.sequence_parallel_size=2",
        "train.mlp_tile_tokens=1024",
        "student.activation_offloading=true",
        "evaluate.generation.backend=transformers",
        "evaluate.seeds=[1]",
        "evaluate.max_new_tokens=32",
        "launch.ranks=2",
        "launch.threads_per_rank=1",
    ]
    pocl("run", "qwen3-reasoning-8b-to-0.6b", "--run-dir", str(run), *words)
    steps = records(run)
    assert len(steps) >= 4 and all(0 < step["loss"] < 20 for step in steps)
    assert max(step["loss_tokens"] / 4 for step in steps) > 7000
    assert (run / "report" / "report.html").is_file()
