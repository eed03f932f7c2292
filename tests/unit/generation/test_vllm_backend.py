"""vLLM against the reference backend, in float32. Each engine runs in a separate process."""

from __future__ import annotations

import json
import logging
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
from fake_clock import FakeClock

from pocl_ds.compat import vllm_private
from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation import vllm_backend
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.subprocess_generator import SubprocessGenerator
from pocl_ds.generation.vllm_backend import VllmGenerator
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer
from pocl_ds.runtime.progress import Progress

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
POSITIONS = 512
GREEDY, SAMPLED = (0.0, 1.0, 24, 0), (1.0, 0.95, 24, 7)  # fields of SamplingParams

ENGINE = """
import json, sys, torch
from pocl_ds.config import GenerationConfig
from pocl_ds.generation.backends import open_generator
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.models.load import load_tokenizer
task = json.load(open(sys.argv[1]))
tokenizer = load_tokenizer(task["model"])
threads = torch.get_num_threads()
config = GenerationConfig(max_num_seqs=4)
generator = open_generator(task["model"], config, tokenizer, max_length=512, threads=1)
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
generator.close()
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


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_opt"])
def test_same_log_probs_and_greedy_text(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
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


class FakeEngine:
    """A `vllm.LLM` that can sleep without a GPU. Records its calls, and refuses what a real engine
    cannot do in its state. Finishes one request per `steps_per_request` engine steps.
    """

    calls: list[Any]
    steps_per_request = 2

    def __init__(self, **options: Any) -> None:
        type(self).calls = [options["enable_sleep_mode"]]
        self.awake = {"weights", "kv_cache"}
        self.llm_engine = self
        self.queue: list[tuple[int, Any]] = []
        self.steps = 0

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

    def enqueue(self, prompts: list[Any], requests: list[Any], use_tqdm: bool) -> None:
        assert len(self.awake) == 2
        self.calls.append("generate")
        # Requests finish in reverse order: outputs must be sorted by their ids.
        self.queue = list(enumerate(requests))

    def has_unfinished_requests(self) -> bool:
        return bool(self.queue)

    def step(self) -> list[Any]:
        self.steps += 1
        if self.steps % self.steps_per_request:
            return [SimpleNamespace(finished=False)]
        number, request = self.queue.pop()
        output = SimpleNamespace(finished=True, request_id=str(number))
        if request.max_tokens == 1:
            output.prompt_logprobs = [None, {8: SimpleNamespace(logprob=-1.0)}]
        else:
            output.outputs = [SimpleNamespace(token_ids=[5 + number, 0])]
        return [output]


def open_fake(folder: Path, level: int, monkeypatch: pytest.MonkeyPatch) -> VllmGenerator:
    engine = SimpleNamespace(
        LLM=FakeEngine,
        SamplingParams=lambda **options: SimpleNamespace(**options),
        TokensPrompt=dict,
    )
    monkeypatch.setattr(vllm_backend, "_import_vllm", lambda alternative: engine)
    monkeypatch.setattr(vllm_private, "supports_sleep", lambda: True)
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
    ("error", "remedy", "absent"),
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
            "if memory is short, lower max_num_seqs",
            "compile",
        ),
    ],
)
def test_an_engine_that_cannot_be_opened(
    error: Exception, remedy: str, absent: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(FakeEngine, "__init__", lambda self, **options: fail(**options))
    with pytest.raises(ResourceError) as caught:
        open_fake(tiny_llama, 0, monkeypatch)
    message = str(caught.value)
    assert message.startswith(f"vLLM cannot open {tiny_llama} (") and message.endswith(
        ", or choose the slower generation.backend=transformers"
    )
    assert (
        remedy in message and absent not in message.replace(str(tiny_llama), "").partition("):")[2]
    )


def test_progress_is_logged_while_one_call_runs(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line at least every ten seconds and one engine step, with number, rate and ETA, also while
    no response is finished: a step takes 4 seconds, a response 8 steps.
    """
    caplog.set_level("INFO", "pocl_ds")
    clock = FakeClock(monkeypatch)
    generator = open_fake(tiny_llama, 0, monkeypatch)
    step, log_times = FakeEngine.step, list[float]()
    monkeypatch.setattr(FakeEngine, "steps_per_request", 8)

    def slow_step(self: FakeEngine) -> list[Any]:
        clock.advance(4)
        return step(self)

    monkeypatch.setattr(FakeEngine, "step", slow_step)
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: log_times.append(clock.now))
    caplog.clear()
    start = clock.now
    with Progress(3, "responses", "score") as progress:
        monkeypatch.setattr(logging.getLogger("pocl_ds"), "handlers", [handler])
        responses = generator.generate_ids([[7]] * 3, SamplingParams(*SAMPLED), progress.advance)
    generator.process_state.restore()
    assert responses == [[5, 0], [6, 0], [7, 0]]
    assert caplog.messages[:3] == [
        "score  0/3 responses  0.00 responses/s  ETA ?",
        "score  0/3 responses  0.00 responses/s  ETA ?",
        "score  1/3 responses  36.0 s/response  ETA 1 min 12 s",
    ]
    assert len(caplog.messages) == 8 and max(np.diff([start, *log_times])) == 12


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_sleeping_engine_wakes_for_each_call(
    level: int, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout's calls: new weights, one comparison, one generation; with level 1 also a
    generation with the previous weights. A call without prompts wakes nothing, and a sleeping
    engine is not put to sleep again.
    """
    generator = open_fake(tiny_llama, level, monkeypatch)
    for _ in range(2):
        generator.load_weights({"model.embed_tokens.weight": torch.zeros(1)})
        generator.log_probs([[7, 8]], [1])
        assert generator.generate_ids([[7]], SamplingParams(*SAMPLED)) == [[5, 0]]
        generator.sleep()
        assert generator.generate_ids([], SamplingParams(*SAMPLED)) == []
        generator.sleep()
    if level == 2:
        with pytest.raises(RuntimeError, match="call load_weights first"):
            generator.generate_ids([[7]], SamplingParams(*SAMPLED))
    else:
        generator.generate_ids([[7]], SamplingParams(*SAMPLED))
        generator.sleep()
    generator.process_state.restore()
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
    assert FakeEngine.calls == expected[level]


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
