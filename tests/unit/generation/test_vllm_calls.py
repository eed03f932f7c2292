"""The calls of the vLLM backend to its engine, with a fake engine."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_clock import FakeClock

from pocl_ds.compat import vllm_private
from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ResourceError
from pocl_ds.generation import vllm_backend, vllm_engine
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.vllm_backend import VllmGenerator
from pocl_ds.models.load import load_model_config, load_tokenizer
from pocl_ds.runtime.progress import Progress

pytestmark = pytest.mark.vllm

SAMPLED = (1.0, 0.95, 24, 7)  # fields of SamplingParams


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


def open_with_fake_engine(
    folder: Path, level: int, monkeypatch: pytest.MonkeyPatch
) -> VllmGenerator:
    engine = SimpleNamespace(
        LLM=FakeEngine,
        SamplingParams=lambda **options: SimpleNamespace(**options),
        TokensPrompt=dict,
    )
    monkeypatch.setattr(vllm_engine, "_import_vllm", lambda alternative: engine)
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
        open_with_fake_engine(tiny_llama, 0, monkeypatch)
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
    generator = open_with_fake_engine(tiny_llama, 0, monkeypatch)
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
    generator.engine.process_state.restore()
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
    generator = open_with_fake_engine(tiny_llama, level, monkeypatch)
    for _ in range(2):
        generator.load_weights([("model.embed_tokens.weight", torch.zeros(1))])
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
    generator.engine.process_state.restore()
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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["embedding", "layer"], ["embedding", "layer", "head"]),
        (["embedding", "head", "layer"], ["embedding", "head", "layer"]),
    ],
)
def test_a_tied_head_is_loaded_once(names: list[str], expected: list[str]) -> None:
    weights = [(name, torch.tensor(float(len(name)))) for name in names]
    loaded = list(vllm_backend._with_tied_heads(iter(weights), {"embedding": "head"}))
    assert [name for name, _ in loaded] == expected
    if "head" not in names:
        assert loaded[-1][1] is weights[0][1]
