"""vLLM against the reference backend, in float32. Each engine runs in a separate process."""

from __future__ import annotations

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

from pocl_ds.compat import vllm_private
from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation.backends import check_length_dependence, open_generator
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.subprocess_generator import SubprocessGenerator
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer
from pocl_ds.models.log_probs import response_log_probs

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
POSITIONS = 512
GREEDY, SAMPLED = (0.0, 1.0, 24, 0), (1.0, 0.95, 24, 7)  # fields of SamplingParams

ENGINE = """
import json, sys, torch
from pocl_ds.config import GenerationConfig
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.reused_generator import ReusedGenerator
from pocl_ds.models.load import load_tokenizer
task = json.load(open(sys.argv[1]))
tokenizer = load_tokenizer(task["model"])
threads = torch.get_num_threads()
config = GenerationConfig(max_num_seqs=4)
length = task.get("max_length", 512)
generators = ReusedGenerator()
opened = []
for model in [*task.get("before", []), task["model"]]:
    generator = generators.open(model, config, tokenizer, max_length=length, threads=1)
    opened.append(generator)
    if model != task["model"]:
        generator.generate(task["prompts"], SamplingParams(*task["greedy"]))
assert all(each is generator for each in opened)
prompts, greedy, sampled = task["prompts"], task["greedy"], task["sampled"]
progress, scored = [], []
result = {
    "greedy": generator.generate(prompts, SamplingParams(*greedy)),
    "sampled": generator.generate(prompts, SamplingParams(*sampled), progress.append),
    "alone": [
        generator.generate([prompt], SamplingParams(*sampled, first_index=n))[0]
        for n, prompt in enumerate(prompts)
    ],
    "log_probs": [
        values.tolist()
        for values in generator.log_probs(task["sequences"], task["starts"], scored.append)
    ],
    "progress": progress,
    "scored": scored,
}
generators.close()
generator.close()
result["state_remains"] = torch.distributed.is_initialized() or torch.get_num_threads() != threads
json.dump(result, open(sys.argv[2], "w"))
"""


def run_in_engine(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a task in a fresh process with a vLLM engine."""
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-c", ENGINE, str(folder / "task.json"), str(folder / "result.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    completed = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def greedy_token(folder: str, prompt: list[int], place: int) -> int:
    """The new token at a place of the greedy response."""
    model: Any = load_model(folder)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=place + 1, do_sample=False)
    return int(output[0, -1])


def with_other_weights(folder: Path, target: Path) -> Path:
    """A copy of a model with the weights of another seed."""
    shutil.copytree(folder, target)
    model: Any = load_model(str(folder))
    with torch.random.fork_rng():
        torch.manual_seed(99)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_opt"])
def test_same_log_probs_and_greedy_text(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Also for a model whose weights an engine of another model takes."""
    folder = request.getfixturevalue(name)
    tokenizer = load_tokenizer(str(folder))
    stem = "Below is an instruction. Explain what the function number {} does, step by step."
    prompts = [tokenizer(stem.format(n)[: 8 + 6 * n]).input_ids for n in range(10)]
    if name == "tiny_llama":  # a second stop id that greedy text runs into: the ends must agree too
        stop = greedy_token(str(folder), prompts[3], 6)
        folder = shutil.copytree(folder, tmp_path / "m")
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [0, stop], "repetition_penalty": 3.0})
        )
    sequences = [
        ids + tokenizer(f" Return the sum of {n} values.").input_ids
        for n, ids in enumerate(prompts)
    ]
    starts = [len(ids) for ids in prompts]
    sequences.append([2 + n % 300 for n in range(POSITIONS)])  # as long as the model has positions
    starts.append(1)
    reference = open_generator(
        str(folder), GenerationConfig(backend="transformers"), tokenizer, max_length=POSITIONS
    )
    expected_text = reference.generate(prompts, SamplingParams(*GREEDY))
    if name == "tiny_llama":
        assert reference.processed_tokens < GREEDY[2] * len(prompts)
    expected = reference.log_probs(sequences, starts)
    reference.close()
    task = {
        "model": str(folder),
        "prompts": prompts,
        "sequences": sequences,
        "starts": starts,
        "greedy": GREEDY,
        "sampled": SAMPLED,
    }
    if name != "tiny_llama":
        task["before"] = [str(with_other_weights(folder, tmp_path / "before"))]
    result = run_in_engine(task, tmp_path)
    assert result["greedy"] == expected_text
    assert [len(values) for values in result["log_probs"]] == [
        len(ids) - n for ids, n in zip(sequences, starts, strict=True)
    ]
    for values, reference_values in zip(result["log_probs"], expected, strict=True):
        np.testing.assert_allclose(values, reference_values, atol=1e-4)
    # Progress comes with every engine step, and counts each sequence once.
    assert sum(result["progress"]) == len(prompts) and sum(result["scored"]) == len(sequences)
    assert len(result["progress"]) >= 2 * SAMPLED[2] and max(result["progress"]) <= 4
    assert result["sampled"] == result["alone"]
    assert result["sampled"] != result["greedy"]
    assert result["state_remains"] is False


def test_longrope_up_to_the_original_context(tiny_longrope: Path, tmp_path: Path) -> None:
    """The engine's limit is one token more than the longest sequence, and yet every sequence has
    the short factors.
    """
    draw = np.random.default_rng(0)
    sequences = [[int(token) for token in draw.integers(2, 300, size)] for size in (64, 30)]
    task = {
        "model": str(tiny_longrope),
        "prompts": [sequence[:20] for sequence in sequences],
        "sequences": sequences,
        "starts": [1, 1],
        "greedy": GREEDY,
        "sampled": SAMPLED,
        "max_length": 64,
    }
    result, model = run_in_engine(task, tmp_path), load_model(str(tiny_longrope))
    expected = response_log_probs(model, sequences, [1, 1], [np.array([0]), np.array([1])])
    for values, reference_values in zip(result["log_probs"], expected, strict=True):
        np.testing.assert_allclose(values, reference_values, atol=1e-4)


def test_longrope_beyond_the_original_context_is_refused(tiny_longrope: Path) -> None:
    with pytest.raises(
        ModelError,
        match="changes its LongRoPE factors after 64 tokens, but sequences of 65 tokens are "
        "requested, for which vLLM would compute the shorter ones with the long factors too: set "
        "score.generation.backend=transformers, or lower prompt.max_length, or "
        "prompt.max_prompt_tokens and max_new_tokens, to 64 tokens in all$",
    ):
        open_generator(
            str(tiny_longrope),
            GenerationConfig(),
            None,
            max_length=65,
            alternative="score.generation.backend=transformers",
        )


def test_dynamic_ntk_beyond_its_context_is_refused(tiny_dynamic_ntk: Path) -> None:
    with pytest.raises(
        ModelError,
        match="scales its rotary frequencies after 64 tokens with the length of each sequence, "
        "which vLLM does not, and sequences of 65 tokens are requested: set x, or lower",
    ):
        check_length_dependence(
            "vllm",
            str(tiny_dynamic_ntk),
            load_model_config(str(tiny_dynamic_ntk)),
            65,
            "x",
        )


def test_the_engine_refuses_a_rank(tiny_llama: Path) -> None:
    """Inside a process group vLLM would create further groups, which other ranks never enter."""
    code = (
        "import torch, sys\n"
        "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), "
        "rank=0, world_size=1)\n"
        "from pocl_ds.generation.backends import open_generator; from pocl_ds.config import "
        "GenerationConfig\n"
        "from pocl_ds.models.load import load_tokenizer\n"
        f"folder = {str(tiny_llama)!r}\n"
        "open_generator(folder, GenerationConfig(), load_tokenizer(folder), max_length=64)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 1
    assert "cannot be opened inside a process that is part of a process group" in completed.stderr


def test_no_engine_sleeps_on_a_cpu() -> None:
    if not torch.cuda.is_available():
        assert vllm_private.supports_sleep() is False


def test_missing_vllm_names_the_alternative(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process itself, as scoring and evaluation open it, and in a rollout's process next to
    a rank.
    """
    config, tokenizer = GenerationConfig(), load_tokenizer(str(tiny_llama))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vllm", None)
        with pytest.raises(
            ResourceError, match=r"or choose the slower evaluate\.generation\.backend=transformers$"
        ):
            open_generator(
                str(tiny_llama),
                config,
                tokenizer,
                max_length=64,
                alternative="evaluate.generation.backend=transformers",
            )
    (tmp_path / "vllm.py").write_text("raise ImportError('not there')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    with pytest.raises(
        ResourceError,
        match=r"cannot be imported \(not there\).*or choose the slower "
        r"policy\.rollout_backend=transformers$",
    ):
        SubprocessGenerator(str(tiny_llama), config, max_length=64, threads=1, device=None)


def test_a_family_that_the_cpu_engine_gets_wrong_is_refused(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig

    if torch.cuda.is_available():
        pytest.skip("only the CPU engine gets it wrong")
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="gpt_neox.*set policy.rollout_backend=transformers"):
        open_generator(
            str(tmp_path),
            GenerationConfig(),
            None,
            max_length=64,
            alternative="policy.rollout_backend=transformers",
        )
