"""The rollout worker: when its generator gets new weights, that they are checked, and that it keeps
them over a resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_clock import FakeClock
from tiny_rollouts import Split, generate, make_worker, update_student
from torch import Tensor

from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation.transformers_backend import TransformersGenerator
from pocl_ds.rollouts.rollout import WEIGHTS_FILE

Weights = Iterable[tuple[str, Tensor]]


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of parameters of the weight transfers."""
    sizes: list[int] = []
    load_weights = TransformersGenerator.load_weights

    def counting_load_weights(self: TransformersGenerator, weights: Weights) -> None:
        named_weights = dict(weights)
        sizes.append(len(named_weights))
        load_weights(self, named_weights.items())

    monkeypatch.setattr(TransformersGenerator, "load_weights", counting_load_weights)
    return sizes


def test_weights_are_synced_at_the_first_rollout_of_an_interval(
    tiny_llama: Path, transfers: list[int]
) -> None:
    rollout, states = make_worker(tiny_llama, interval=3), []
    for step in (1, 2, 3, 5, 7):
        generate(rollout, step)
        update_student(rollout)
        states.append((rollout.stats.staleness_steps, len(transfers)))
    assert states == [(0, 1), (1, 1), (0, 2), (2, 2), (0, 3)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.embed_tokens.weight", "float32"),
        ("model.embed_tokens.weight", "bfloat16"),
        ("model.layers.1.mlp.down_proj.weight", "float32"),
    ],
)
def test_a_generator_that_keeps_an_old_weight_ends_the_run(
    name: str, dtype: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = make_worker(tiny_llama, dtype=dtype)
    generate(rollout, 0)
    load_weights, old_weight = (
        TransformersGenerator.load_weights,
        dict(rollout.engine.gathered_parameters(rollout.module.model))[name],
    )
    monkeypatch.setattr(
        TransformersGenerator,
        "load_weights",
        lambda self, weights: load_weights(self, {**dict(weights), name: old_weight}.items()),
    )
    generate(rollout, 1)  # the old weight is still the current one
    update_student(rollout)
    with pytest.raises(
        ResourceError,
        match=r"is [\d.]+ nats in .* and [\d.]+ in the student: the generator did not load the new "
        r"weights",
    ):
        generate(rollout, 2)


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "tokens", "tolerance"),
    [
        ("float32", False, 6, 1e-3),
        ("float32", True, 1, 0.06),
        ("float32", True, 6, 1e-2 + 0.05 / 6),
        ("bfloat16", False, 1, 0.6),
        ("bfloat16", True, 1, 0.6),
        ("bfloat16", True, 100, 0.105),
    ],
)
@pytest.mark.parametrize("share", [-0.5, 0.5, 1.5, float("nan")])
def test_the_tolerance_of_the_weight_check(
    share: float,
    dtype: str,
    on_gpu: bool,
    tokens: int,
    tolerance: float,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A short response has a larger tolerance per token. The longest response of the batch is
    checked.
    """
    rollout, split = make_worker(tiny_llama, dtype=dtype), Split()
    split.loss_tokens = np.array([1, tokens, 1, 1])
    split.total_tokens = split.prompt_tokens + split.loss_tokens
    monkeypatch.setattr(
        split, "tokens", lambda row: np.arange(2, 2 + split.total_tokens[row]).astype(np.uint32)
    )
    rollout.dataset, rollout.generator_length, rollout.on_gpu = split, 200, on_gpu
    rollout.invariance = {}  # checked before
    scored_tokens, log_probs = [], TransformersGenerator.log_probs

    def shifted(self: TransformersGenerator, sequences: Any, starts: Any) -> Any:
        values = log_probs(self, sequences, starts)
        scored_tokens.append(len(values[0]))
        return [value + share * tolerance for value in values]

    monkeypatch.setattr(TransformersGenerator, "log_probs", shifted)
    if abs(share) < 1:
        generate(rollout, 0)
    else:
        with pytest.raises(ResourceError, match="the generator did not load the new weights"):
            generate(rollout, 0)
    assert scored_tokens == [tokens]


@pytest.mark.parametrize("others", ["batch mates", "the trainer"])
def test_a_generator_that_depends_on_others_ends_the_run(
    others: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first rollout, on some samples of the data, and once."""
    rollout, log_probs = make_worker(tiny_llama), TransformersGenerator.log_probs
    generate(rollout, 0)
    assert rollout.invariance is not None and rollout.invariance["samples"] == 4
    assert rollout.invariance["largest_difference"] < 1e-5

    def broken(self: TransformersGenerator, sequences: Any, starts: Any) -> Any:
        shift = 0.01 * (len(sequences) - 1 if others == "batch mates" else 1)
        return [value + shift for value in log_probs(self, sequences, starts)]

    monkeypatch.setattr(TransformersGenerator, "log_probs", broken)
    second = make_worker(tiny_llama)
    monkeypatch.setattr(second, "_check_weights", lambda row: None)
    place = "a batch of 4" if others == "batch mates" else "the trainer"
    with pytest.raises(
        ModelError,
        match=rf"^rollouts: the student in transformers: the cross-entropy of sample s\d "
        rf"\(6 response tokens\) is [\d.]+ nats alone and [\d.]+ in {place}, 0.0[13]00 nats "
        r"a token apart, where rounding in float32 explains 0.0010: set policy.max_num_seqs=1 or "
        r"policy.rollout_backend=vllm$",
    ):
        generate(second, 0)


def test_the_weights_are_compared_on_the_last_response(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if earlier turns train too."""
    split = Split()
    monkeypatch.setattr(split, "loss_mask", lambda row: np.ones(10, bool), raising=False)
    rollout = make_worker(tiny_llama)
    rollout.dataset = split
    generate(rollout, 0)


def test_the_generator_allows_what_the_data_needs(tiny_llama: Path) -> None:
    """A limit of vLLM that no sequence needs would change LongRoPE's factors."""
    assert make_worker(tiny_llama).generator_length == 4 + 12  # a prompt, and a new response


def test_a_resumed_generator_gets_the_weights_that_it_had(tiny_llama: Path, tmp_path: Path) -> None:
    """Steps 4 to 7 generate with the weights of step 4. The run stops before step 6, where the
    student is two steps ahead.
    """
    original, resumed, without_weights = (make_worker(tiny_llama, interval=4) for _ in range(3))
    generate(original, 4)
    update_student(original)
    save = original.snapshot(6)
    expected = generate(original, 6), generate(original, 8)
    assert save(tmp_path) == [tmp_path / WEIGHTS_FILE]
    for trainer_copy in (resumed, without_weights):
        update_student(trainer_copy)
    resumed.restore(tmp_path)
    assert generate(resumed, 6) == expected[0] and resumed.stats.staleness_steps == 2
    assert resumed.snapshot(7)(tmp_path) and not resumed.snapshot(8)(tmp_path)
    assert generate(resumed, 8) == expected[1] and resumed.stats.staleness_steps == 0
    without_weights.restore(tmp_path / "nothing")
    assert generate(without_weights, 6) != expected[0]


def test_no_weights_are_saved_if_every_step_syncs(tiny_llama: Path, tmp_path: Path) -> None:
    rollout = make_worker(tiny_llama)
    generate(rollout, 4)
    assert (
        rollout.saved_weights == {}
        and rollout.snapshot(5)(tmp_path) == []
        and list(tmp_path.iterdir()) == []
    )


class Level2Generator:
    """A generator whose engine drops its weights to sleep, as on a GPU. Records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def load_weights(self, weights: Weights) -> None:
        self.calls.append("load_weights")

    def generate_ids(
        self, prompts: list[list[int]], sampling: Any, on_progress: Any
    ) -> list[list[int]]:
        self.calls.append("generate_ids")
        return [[5, 0]] * len(prompts)

    def sleep(self) -> None:
        self.calls.append("sleep")


@pytest.mark.parametrize("interval", [1, 4])
def test_the_engine_sleeps_between_rollouts(
    interval: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a resume. An engine that dropped its weights gets them again for a second rollout
    of the same step.
    """
    rollout = make_worker(tiny_llama, interval=interval)
    generator: Any = Level2Generator()
    rollout.config = rollout.config.model_copy(update={"rollout_backend": "vllm"})
    monkeypatch.setattr(rollout, "on_gpu", True)
    monkeypatch.setattr(rollout, "_check_weights", lambda row: None)
    monkeypatch.setattr(rollout, "_check_batch_invariance", lambda: None)
    monkeypatch.setattr(rollout, "_make_generator", lambda settings: generator)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    generate(rollout, 0)
    generate(rollout, 0)
    calls = ["load_weights", "generate_ids", "sleep"]
    assert generator.calls == (calls + calls if interval == 1 else calls + calls[1:])
    torch.save({"step": 0, "weights": {}}, tmp_path / WEIGHTS_FILE)
    rollout.restore(tmp_path)
    assert generator.calls[-2:] == ["load_weights", "sleep"]


@pytest.mark.parametrize(
    ("interval", "change", "lost"), [(4, 0.0, False), (4, 0.1, True), (1, 0.1, False)]
)
def test_an_engine_that_woke_up_has_the_weights_that_it_had(
    interval: int,
    change: float,
    lost: bool,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At level 1 it is compared with itself before it slept. At level 2 it gets the student's
    weights before each rollout, and is compared with the student.
    """
    rollout = make_worker(tiny_llama, interval=interval)
    rollout.config, settings = (
        rollout.config.model_copy(update={"rollout_backend": "vllm"}),
        rollout._generation_config(),
    )
    make_generator = rollout._make_generator

    def open_generator(_: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "config", make_worker(tiny_llama).config)
            return make_generator(settings)

    @torch.no_grad()
    def sleep(self: TransformersGenerator) -> None:
        next(self.model.parameters()).add_(change)

    monkeypatch.setattr(rollout, "on_gpu", True)
    monkeypatch.setattr(rollout, "_make_generator", open_generator)
    monkeypatch.setattr(TransformersGenerator, "sleep", sleep)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    generate(rollout, 0)
    update_student(rollout)
    if lost:
        with pytest.raises(
            ResourceError,
            match=r"was [\d.]+ nats in the rollout generator before it slept, and is [\d.]+ after "
            r"it woke up: it lost its weights; set policy.sync_weights_every=1",
        ):
            generate(rollout, 1)
    else:
        generate(rollout, 1)


@pytest.mark.parametrize(("seconds", "lines"), [(1, 0), (4, 2)])
def test_only_a_long_rollout_logs_its_progress(
    seconds: int,
    lines: int,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Four responses, one after the other, of 1 or 4 seconds each."""
    caplog.set_level("INFO", "pocl_ds")
    worker, clock = make_worker(tiny_llama), FakeClock(monkeypatch)
    generator: Any = Level2Generator()

    def generate_ids(prompts: list[list[int]], sampling: Any, on_progress: Any) -> list[list[int]]:
        for _ in prompts:
            clock.advance(seconds)
            on_progress(1)
        return [[5, 0]] * len(prompts)

    generator.generate_ids = generate_ids
    monkeypatch.setattr(worker, "_check_weights", lambda row: None)
    monkeypatch.setattr(worker, "_check_batch_invariance", lambda: None)
    monkeypatch.setattr(worker, "_make_generator", lambda settings: generator)
    generate(worker, 3)
    progress = [line for line in caplog.messages if line.startswith("rollout of step 4")]
    assert len(progress) == lines
    assert all(" responses  0.25 responses/s  ETA " in line for line in progress)
