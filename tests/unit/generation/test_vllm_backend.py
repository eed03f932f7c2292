"""vLLM held to the reference backend, in float32: each engine in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import GenerationConfig
from pocl_ds.generation.open import open_generator
from pocl_ds.generation.protocol import Sampling
from pocl_ds.models.load import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

ROOT = Path(__file__).resolve().parents[3]
POSITIONS = 512
GREEDY, DRAWN = (0.0, 1.0, 24, 0), (1.0, 0.95, 24, 7)  # fields of Sampling

ENGINE = """
import json, sys, torch
from pocl_ds.config import GenerationConfig
from pocl_ds.generation.open import open_generator
from pocl_ds.generation.protocol import Sampling
from pocl_ds.models.load import load_tokenizer
task = json.load(open(sys.argv[1]))
tokenizer = load_tokenizer(task["model"])
threads = torch.get_num_threads()
generator = open_generator(task["model"], GenerationConfig(max_sequences=4), tokenizer, max_length=512, threads=1)
prompts = task["prompts"]
result = {
    "greedy": generator.generate(prompts, Sampling(*task["greedy"])),
    "drawn": generator.generate(prompts, Sampling(*task["drawn"])),
    "alone": [generator.generate([p], Sampling(*task["drawn"], first=n))[0] for n, p in enumerate(prompts)],
    "log_probs": [found.tolist() for found in generator.log_probs(task["sequences"], task["starts"])],
}
generator.close()
generator.close()
result["left"] = torch.distributed.is_initialized() or torch.get_num_threads() != threads
json.dump(result, open(sys.argv[2], "w"))
"""


def in_engine(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a task in a fresh process with a vLLM engine."""
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-c", ENGINE, str(folder / "task.json"), str(folder / "result.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def written_token(folder: str, prompt: list[int], place: int) -> int:
    """The token that greedy decoding writes at a place."""
    model: Any = load_model(folder)
    written = model.generate(torch.tensor([prompt]), max_new_tokens=place + 1, do_sample=False)
    return int(written[0, -1])


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_opt"])
def test_same_log_probs_and_greedy_text(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    tokenizer = load_tokenizer(str(folder))
    stem = "Below is an instruction. Explain what the function number {} does, step by step."
    prompts = [tokenizer(stem.format(n)[: 8 + 6 * n]).input_ids for n in range(10)]
    if name == "tiny_llama":  # a second stop id that greedy text runs into: the ends must agree too
        stop = written_token(str(folder), prompts[3], 6)
        folder = shutil.copytree(folder, tmp_path / "m")
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [0, stop], "repetition_penalty": 3.0})
        )
    sequences = [ids + tokenizer(f" Return the sum of {n} values.").input_ids for n, ids in enumerate(prompts)]
    starts = [len(ids) for ids in prompts]
    sequences.append([2 + n % 300 for n in range(POSITIONS)])  # as long as the model has positions
    starts.append(1)
    reference = open_generator(str(folder), GenerationConfig(backend="transformers"), tokenizer, max_length=POSITIONS)
    expected_text = reference.generate(prompts, Sampling(*GREEDY))
    if name == "tiny_llama":
        assert reference.tokens < GREEDY[2] * len(prompts)
    expected = reference.log_probs(sequences, starts)
    reference.close()
    task = {
        "model": str(folder),
        "prompts": prompts,
        "sequences": sequences,
        "starts": starts,
        "greedy": GREEDY,
        "drawn": DRAWN,
    }
    found = in_engine(task, tmp_path)
    assert found["greedy"] == expected_text
    assert [len(values) for values in found["log_probs"]] == [
        len(ids) - n for ids, n in zip(sequences, starts, strict=True)
    ]
    for values, wanted in zip(found["log_probs"], expected, strict=True):
        np.testing.assert_allclose(values, wanted, atol=1e-4)
    assert found["drawn"] == found["alone"]
    assert found["drawn"] != found["greedy"]
    assert found["left"] is False


def test_the_engine_refuses_a_rank(tiny_llama: Path) -> None:
    """Inside a group of ranks vLLM would make groups of its own, which some ranks never enter."""
    code = (
        "import torch, sys\n"
        "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)\n"
        "from pocl_ds.generation.open import open_generator; from pocl_ds.config import GenerationConfig\n"
        "from pocl_ds.models.load import load_tokenizer\n"
        f"folder = {str(tiny_llama)!r}\n"
        "open_generator(folder, GenerationConfig(), load_tokenizer(folder), max_length=64)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "cannot be opened inside a process that is part of a group of ranks" in done.stderr
