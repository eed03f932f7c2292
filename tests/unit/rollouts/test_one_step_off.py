"""Responses that are generated one optimizer step ahead (`policy.staleness: 1`): with which
weights, that a resumed training equals an uninterrupted one, and that closing does not hang.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_rollouts import SIZE, Split, generate, make_worker, update_student

from pocl_ds.config import LossConfig, PolicyConfig, StudentConfig, TrainConfig
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import Sampler, SamplerPosition
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.errors import Interrupted, ResourceError
from pocl_ds.generation import engine_process
from pocl_ds.generation.protocol import SamplingParams
from pocl_ds.generation.subprocess_generator import SubprocessGenerator
from pocl_ds.generation.transformers_backend import TransformersGenerator
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts.pending import RESPONSES_FILE
from pocl_ds.rollouts.policies import POLICIES
from pocl_ds.rollouts.rollout import WEIGHTS_FILE, RolloutWorker
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.student import Student
from pocl_ds.training.trainer import Trainer

STEPS, BATCH = 8, 2
OTHER_ROWS = np.array([1, 3])


def make_stale_worker(folder: Path, *, interval: int = 1) -> RolloutWorker:
    worker = make_worker(folder, interval=interval)
    worker.config = worker.config.model_copy(update={"staleness": 1})
    return worker


def generate_ahead(worker: RolloutWorker, step: int, rows: Any = None) -> None:
    rows = np.arange(4) if rows is None else rows
    worker.generate_ahead(rows, SamplerPosition(step, 0, 0, step))


def test_responses_of_the_next_step_come_from_the_weights_before_this_one(tiny_llama: Path) -> None:
    worker, reference = make_stale_worker(tiny_llama), make_worker(tiny_llama)
    expected = generate(reference, 3)
    generate_ahead(worker, 3)
    update_student(worker)
    assert generate(worker, 3) == expected and worker.ahead is None
    stats = worker.stats
    assert stats.staleness_steps == 1 and stats.tokens > 0
    assert 0 < stats.weight_sync_seconds < stats.seconds and stats.wait_seconds < stats.seconds
    update_student(reference)
    assert generate(worker, 4) == generate(reference, 4) and worker.stats.staleness_steps == 0


def test_staleness_adds_to_the_interval_of_the_weights(tiny_llama: Path) -> None:
    worker, staleness = make_stale_worker(tiny_llama, interval=3), []
    for step in range(8):
        generate(worker, step)
        staleness.append(worker.stats.staleness_steps)
        generate_ahead(worker, step + 1)
    assert staleness == [0, 1, 2, 3, 1, 2, 3, 1]


def test_responses_that_the_policy_does_not_use_are_dropped(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker, reference = make_stale_worker(tiny_llama), make_worker(tiny_llama)
    generate_ahead(worker, 3, OTHER_ROWS)
    assert generate(worker, 3) == generate(reference, 3)
    assert "the policy did not use the responses that were generated for step 4" in caplog.text


def test_a_checkpoint_holds_the_responses_of_the_next_step(
    tiny_llama: Path, tmp_path: Path
) -> None:
    worker, resumed = make_stale_worker(tiny_llama), make_stale_worker(tiny_llama)
    generate_ahead(worker, 3)
    update_student(worker)
    assert worker.snapshot(3)(tmp_path) == [tmp_path / RESPONSES_FILE]
    expected = generate(worker, 3)
    update_student(resumed)
    resumed.restore(tmp_path)
    assert generate(resumed, 3) == expected and resumed.generator is None
    assert resumed.stats.staleness_steps == 1 and resumed.stats.tokens == worker.stats.tokens
    assert resumed.snapshot(4)(tmp_path) == []


def test_an_error_in_the_background_ends_the_step_that_needs_the_responses(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = run_in_background(make_stale_worker(tiny_llama), monkeypatch)

    def fail(*_: Any) -> Any:
        raise ResourceError("the generator failed")

    monkeypatch.setattr(TransformersGenerator, "generate_ids", fail)
    generate_ahead(worker, 3)
    with pytest.raises(ResourceError, match="the generator failed"):
        generate(worker, 3)


def run_in_background(worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch) -> RolloutWorker:
    """Generate with transformers in a thread, where vLLM's process would be."""
    settings = worker._generation_config()
    make_generator = worker._make_generator
    worker.config = worker.config.model_copy(update={"rollout_backend": "vllm"})
    monkeypatch.setattr(worker, "_make_generator", lambda _: make_generator(settings))
    return worker


def make_trainer(
    folder: Path, model_path: Path, policy: PolicyConfig, monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    """A training by SFT on the student's responses, whose weights move far in each step."""
    splits: list[Any] = [Split(), Split()]
    splits[1].name = "validation"
    train = TrainConfig.model_validate(
        {
            "engine": "torch",
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "lr": 0.03,
            "min_lr": 0.03,
            "validate_every_n_steps": 2,
            "checkpoint": {"every_n_steps": 3, "async_save": False},
            "tracking": {"tensorboard": False},
        }
    )
    model: Any = load_model(str(model_path), attention=PER_SAMPLE, dtype="float32")
    engine = TorchEngine(Student(model, VocabMap(SIZE), chunk_bytes=1 << 20).train(), train)
    worker = RolloutWorker(
        policy.model_copy(update={"rollout_backend": "transformers"}),
        StudentConfig(model=str(model_path), dtype="float32"),
        str(model_path),
        engine,
        splits[0],
        VocabMap(SIZE),
        seed=3,
        max_length=20,
    )
    if policy.rollout_backend == "vllm":
        run_in_background(worker, monkeypatch)
    source: Any = POLICIES[policy.name](policy, worker.generate, 3)
    source.phi = 0.8  # of DistiLLM: without a rise of the validation loss
    plan = single_stage_plan(
        np.arange(4), steps=STEPS, batch_size=BATCH, temperature=1.0, sft_ratio=0.0
    )
    return Trainer(
        TrainingModels(engine, NoTeacher()),
        TrainingData(splits[0], splits[1], Layout(False, 0.0), BATCH),
        TrainingSchedule(plan, Sampler(plan, 3), train),
        LossConfig(name="sft"),
        ResponseSource(source, worker),
        Checkpoints(folder / "checkpoints", train.checkpoint, fingerprint="f"),
        TrainingMonitor(folder, "train", train),
    )


def run_and_read(trainer: Trainer) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """The metrics of the steps that do not depend on time, and the final weights."""
    trainer.run()
    lines = (trainer.monitor.directory / "metrics.jsonl").read_text().splitlines()
    names = ("step", "loss", "grad_norm", "on_policy", "staleness_steps", "rollout_tokens")
    steps = [
        {name: line[name] for name in names}
        for line in map(json.loads, lines)
        if line["kind"] == "step"
    ]
    state = trainer.models.engine.module.state_dict()
    return steps, {name: weight.numpy() for name, weight in state.items()}


def stop_after(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send TERM to a training in an optimizer step, after which it saves and stops."""
    engine_step: Callable[..., Any] = trainer.models.engine.step
    steps = 0

    def step_and_signal(lr: float) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            signal.raise_signal(signal.SIGTERM)
        return engine_step(lr)

    monkeypatch.setattr(trainer.models.engine, "step", step_and_signal)
    with pytest.raises(Interrupted):
        trainer.run()


@pytest.mark.parametrize(
    ("name", "options", "staleness"),
    [
        ("gkd", {"lmbda": 1.0}, [0, *[1] * (STEPS - 1)]),
        ("gkd", {"lmbda": 1.0, "sync_weights_every": 3}, [0, 1, 2, 3, 1, 2, 3, 1]),
        ("gkd", {"lmbda": 0.6}, None),
        ("distillm", {"replay_buffer_size": 4}, None),
    ],
)
def test_a_resumed_training_equals_an_uninterrupted_one(
    name: str,
    options: dict[str, Any],
    staleness: list[int] | None,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, after a stop at any step; and generating in the background gives the same as
    generating before the step.
    """
    policy = PolicyConfig(
        name=name, rollout_backend="vllm", staleness=1, max_new_tokens=6, **options
    )
    steps, weights = run_and_read(make_trainer(tmp_path / "whole", tiny_llama, policy, monkeypatch))
    assert len(steps) == STEPS
    assert staleness in (None, [step["staleness_steps"] for step in steps])
    assert any(step["staleness_steps"] == 1 for step in steps)
    if name == "distillm":
        assert any(step["on_policy"] and not step["rollout_tokens"] for step in steps), "no replay"

    in_place = policy.model_copy(update={"rollout_backend": "transformers"})
    runs = [run_and_read(make_trainer(tmp_path / "place", tiny_llama, in_place, monkeypatch))]
    for stop in (1, 4):
        folder = tmp_path / str(stop)
        stop_after(make_trainer(folder, tiny_llama, policy, monkeypatch), stop, monkeypatch)
        saved = {path.name for path in (folder / "checkpoints" / f"step-{stop:08d}").iterdir()}
        assert (RESPONSES_FILE in saved) == (
            steps[stop]["staleness_steps"] > 0 and steps[stop]["rollout_tokens"] > 0
        )
        assert (WEIGHTS_FILE in saved) == (stop % policy.sync_weights_every > 0)
        runs.append(run_and_read(make_trainer(folder, tiny_llama, policy, monkeypatch)))
    for other_steps, other_weights in runs:
        assert other_steps == steps
        assert all(np.array_equal(weights[key], other_weights[key]) for key in weights)


def test_stale_responses_change_the_training(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests above would compare nothing."""
    policy = PolicyConfig(name="gkd", lmbda=1.0, rollout_backend="transformers", max_new_tokens=6)
    stale = policy.model_copy(update={"staleness": 1})
    fresh_steps, _ = run_and_read(make_trainer(tmp_path / "a", tiny_llama, policy, monkeypatch))
    stale_steps, _ = run_and_read(make_trainer(tmp_path / "b", tiny_llama, stale, monkeypatch))
    assert all(step["staleness_steps"] == 0 for step in fresh_steps)
    assert fresh_steps[0] == stale_steps[0] and fresh_steps[1]["loss"] != stale_steps[1]["loss"]


def test_an_error_in_training_does_not_wait_for_the_generator(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that would never return ends when the generator is closed."""
    policy = PolicyConfig(
        name="gkd", lmbda=1.0, rollout_backend="vllm", staleness=1, max_new_tokens=6
    )
    trainer, closed = make_trainer(tmp_path, tiny_llama, policy, monkeypatch), threading.Event()
    generate_ids = TransformersGenerator.generate_ids

    def generate_until_closed(self: Any, *arguments: Any) -> Any:
        if threading.current_thread().name == "rollout":
            assert closed.wait(60)
            raise ResourceError("the process that generates the student's responses ended")
        return generate_ids(self, *arguments)

    def fail(lr: float) -> float:
        raise RuntimeError("the optimizer failed")

    monkeypatch.setattr(TransformersGenerator, "generate_ids", generate_until_closed)
    monkeypatch.setattr(TransformersGenerator, "close", lambda self: closed.set())
    monkeypatch.setattr(trainer.models.engine, "step", fail)
    with pytest.raises(RuntimeError, match="the optimizer failed"):
        trainer.run()
    assert "rollout" not in {thread.name for thread in threading.enumerate()}


# A child that answers the first call and never another one.
BUSY_CHILD = """
import sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
connection.recv_bytes()
connection.send(("result", (0, [])))
connection.recv_bytes()
connection.send(("progress", 0))
time.sleep(600)
"""


def test_closing_ends_a_process_in_the_middle_of_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        engine_process, "module_command", lambda _: [sys.executable, "-c", BUSY_CHILD]
    )
    config: Any = None
    generator = SubprocessGenerator("model", config, max_length=8, threads=1, device=None)
    started, errors = threading.Event(), []

    def call() -> None:
        try:
            generator.generate_ids(
                [[1]], SamplingParams(1.0, 1.0, 4, seed=0), lambda finished: started.set()
            )
        except ResourceError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert started.wait(30)
    generator.close()
    thread.join(30)
    assert not thread.is_alive() and generator.process.poll() is not None
    (message,) = errors
    assert "the process that generates the student's responses ended with code" in message
