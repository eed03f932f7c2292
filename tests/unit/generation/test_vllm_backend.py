"""vLLM held to the reference backend, in float32: each engine in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation import vllm_backend
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Sampling
from pocl_ds.generation.subprocess_generator import ChildGenerator
from pocl_ds.generation.vllm_backend import VllmGenerator
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
POSITIONS = 512
GREEDY, DRAWN = (0.0, 1.0, 24, 0), (1.0, 0.95, 24, 7)  # fields of Sampling

ENGINE = """
import json, sys, torch
from pocl_ds.config import GenerationConfig
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import Sampling
from pocl_ds.models.load import load_tokenizer
task = json.load(open(sys.argv[1]))
tokenizer = load_tokenizer(task["model"])
threads = torch.get_num_threads()
generator = open_generator(task["model"], GenerationConfig(max_num_seqs=4), tokenizer, max_length=512, threads=1)
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
def test_same_log_probs_and_greedy_text(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
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
        "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), "
        "rank=0, world_size=1)\n"
        "from pocl_ds.generation.backends import open_generator; from pocl_ds.config import "
        "GenerationConfig\n"
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


class SleepingEngine:
    """In place of an engine on a GPU, which alone can sleep: writes down what it is asked, and
    refuses what a real one could not do then.
    """

    calls: list[Any]

    def __init__(self, **options: Any) -> None:
        type(self).calls = [options["enable_sleep_mode"]]
        self.awake = {"weights", "kv_cache"}

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.awake = set()

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert not self.awake & set(tags or [])
        self.calls.append(f"wake {' '.join(tags or ['all'])}")
        self.awake |= set(tags or ["weights", "kv_cache"])

    def apply_model(self, function: Any) -> list[Any]:
        return [function(torch.nn.Module())]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert "weights" in self.awake
        self.calls.append(method)

    def generate(self, prompts: list[Any], requests: list[Any], use_tqdm: bool) -> list[Any]:
        assert len(self.awake) == 2
        self.calls.append("generate")
        if requests[0].max_tokens == 1:
            return [SimpleNamespace(prompt_logprobs=[None, {8: SimpleNamespace(logprob=-1.0)}])]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 0])])]


def opened_asleep(folder: Path, level: int, monkeypatch: pytest.MonkeyPatch) -> VllmGenerator:
    engine = SimpleNamespace(
        LLM=SleepingEngine,
        SamplingParams=lambda **options: SimpleNamespace(**options),
        TokensPrompt=dict,
    )
    monkeypatch.setattr(vllm_backend, "_import_vllm", lambda instead: engine)
    monkeypatch.setattr(vllm_backend, "_can_sleep", lambda: True)
    tokenizer, config = load_tokenizer(str(folder)), load_model_config(str(folder))
    return VllmGenerator(
        str(folder),
        GenerationConfig(),
        tokenizer,
        model_config=config,
        max_length=64,
        sleep_level=level,
    )


@pytest.mark.parametrize(
    ("error", "words", "silent"),
    [
        (
            subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
            "non-zero exit status 1.): on a GPU it compiles",
            "memory",
        ),
        (
            RuntimeError("Failed to find C compiler. Please specify"),
            "install gcc and python3.",
            "memory",
        ),
        (
            RuntimeError("backend='inductor' raised: Command '['/usr/bin/gcc', 'x.c']' failed"),
            "with a C compiler",
            "memory",
        ),
        (
            ValueError("No available memory for the cache blocks"),
            "where memory is short lower max_num_seqs",
            "compile",
        ),
    ],
)
def test_an_engine_that_cannot_be_opened(
    error: Exception, words: str, silent: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(SleepingEngine, "__init__", lambda self, **options: fail(**options))
    with pytest.raises(ResourceError) as caught:
        opened_asleep(tiny_llama, 0, monkeypatch)
    said = str(caught.value)
    assert said.startswith(f"vLLM cannot open {tiny_llama} (") and said.endswith(
        ", or choose the slower generation.backend=transformers"
    )
    assert words in said and silent not in said.replace(str(tiny_llama), "").partition("):")[2]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_engine_that_sleeps_wakes_for_what_it_is_asked(
    level: int, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout's steps: new weights, one comparison, one write; and with level 1 a write with the
    weights of before. Nothing to write wakes nothing, and an engine at rest is not sent to rest
    again.
    """
    generator = opened_asleep(tiny_llama, level, monkeypatch)
    for _ in range(2):
        generator.refresh({"model.embed_tokens.weight": torch.zeros(1)})
        generator.log_probs([[7, 8]], [1])
        assert generator.write([[7]], Sampling(*DRAWN)) == [[5, 0]]
        generator.rest()
        assert generator.write([], Sampling(*DRAWN)) == []
        generator.rest()
    if level == 2:
        with pytest.raises(RuntimeError, match="refresh it first"):
            generator.write([[7]], Sampling(*DRAWN))
    else:
        generator.write([[7]], Sampling(*DRAWN))
        generator.rest()
    generator.settings.restore()
    step, sleep = ["reload_weights", "generate", "generate"], [f"sleep {level}"]
    expected = {
        0: [False, *step, *step, "generate"],
        1: [
            True,
            *step,
            *sleep,
            "wake weights",
            "reload_weights",
            "wake kv_cache",
            *step[1:],
            *sleep,
            "wake all",
            "generate",
            *sleep,
        ],
        2: [
            True,
            *step,
            *sleep,
            "wake weights",
            "reload_weights",
            "wake kv_cache",
            *step[1:],
            *sleep,
        ],
    }
    assert SleepingEngine.calls == expected[level]


def test_no_engine_sleeps_on_a_cpu() -> None:
    if not torch.cuda.is_available():
        assert vllm_backend._can_sleep() is False


def test_without_vllm_the_setting_that_does_without_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process itself, as scoring and evaluation open it, and in a rollout's process beside a
    rank.
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
                instead="evaluate.generation.backend=transformers",
            )
    (tmp_path / "vllm.py").write_text("raise ImportError('not there')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    with pytest.raises(
        ResourceError,
        match=r"cannot be imported \(not there\).*or choose the slower policy\.rollout_backend=transformers$",
    ):
        ChildGenerator(str(tiny_llama), config, max_length=64, threads=1, device=None)


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
            instead="policy.rollout_backend=transformers",
        )
