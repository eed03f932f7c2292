"""The writer of the student's responses: when it gets new weights, that it is held to them, that it
keeps them over a stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import PolicyConfig, StudentConfig, TrainConfig
from pocl_ds.curriculum.sampler import Position
from pocl_ds.engines.engine import TorchEngine
from pocl_ds.errors import ResourceError
from pocl_ds.generation.transformers_backend import TransformersGenerator
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import Ids
from pocl_ds.rollouts.rollout import WRITER, Rollout
from pocl_ds.training.student import Student

SIZE, ROWS = 320, np.arange(4)


class Split:
    """Four samples of ten tokens, of which four are asked."""

    name = "train"
    ids = np.array([f"s{row}".encode() for row in range(4)], "S4")
    prompt_tokens = np.full(4, 4, np.int64)
    total_tokens = np.full(4, 10, np.int64)
    loss_tokens = total_tokens - prompt_tokens

    def __len__(self) -> int:
        return 4

    def tokens(self, row: int) -> NDArray[np.uint32]:
        return np.random.default_rng(row).integers(2, SIZE, 10).astype(np.uint32)


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each refresh brought."""
    found: list[int] = []
    refresh = TransformersGenerator.refresh

    def counted(self: TransformersGenerator, weights: Mapping[str, Tensor]) -> None:
        found.append(len(weights))
        refresh(self, weights)

    monkeypatch.setattr(TransformersGenerator, "refresh", counted)
    return found


def made(folder: Path, *, every: int = 1, dtype: Any = "float32") -> Rollout:
    model: Any = load_model(str(folder), attention=PER_SAMPLE, dtype=dtype)
    engine = TorchEngine(Student(model, Ids(SIZE), chunk_bytes=1 << 20).train(), TrainConfig())
    policy = PolicyConfig(
        name="gkd", rollout_backend="transformers", sync_weights_every=every, max_new_tokens=12
    )
    student = StudentConfig(model=str(folder), dtype=dtype)
    return Rollout(policy, student, str(folder), engine, Split(), Ids(SIZE), seed=3, longest=20)


def learn(rollout: Rollout, size: float = 0.05) -> None:
    """What an optimizer step would do to the student."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rollout.module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=source))


def write(rollout: Rollout, step: int) -> list[list[int]]:
    return [text.tolist() for text in rollout.write(ROWS, Position(step, 0, 0, step)).texts]


def test_new_weights_come_with_the_first_writing_of_so_many_steps(
    tiny_llama: Path, refreshed: list[int]
) -> None:
    rollout, seen = made(tiny_llama, every=3), []
    for step in (1, 2, 3, 5, 7):
        write(rollout, step)
        learn(rollout)
        seen.append((rollout.cost.staleness, len(refreshed)))
    assert seen == [(0, 1), (1, 1), (0, 2), (2, 2), (0, 3)]


@pytest.mark.parametrize(
    ("kept", "dtype"),
    [
        ("model.embed_tokens.weight", "float32"),
        ("model.embed_tokens.weight", "bfloat16"),
        ("model.layers.1.mlp.down_proj.weight", "float32"),
    ],
)
def test_a_writer_that_keeps_an_old_weight_ends_the_run(
    kept: str, dtype: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = made(tiny_llama, dtype=dtype)
    write(rollout, 0)
    refresh, old = (
        TransformersGenerator.refresh,
        dict(rollout.engine.weights(rollout.module.model))[kept],
    )
    monkeypatch.setattr(
        TransformersGenerator,
        "refresh",
        lambda self, weights: refresh(self, {**weights, kept: old}),
    )
    write(rollout, 1)  # which is still the new one
    learn(rollout)
    with pytest.raises(
        ResourceError,
        match=r"response [\d.]+ nats and the student [\d.]+: it did not take the new weights",
    ):
        write(rollout, 2)


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "tokens", "allowed"),
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
def test_how_far_a_writer_may_be_off_a_token(
    share: float,
    dtype: str,
    on_gpu: bool,
    tokens: int,
    allowed: float,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By more in a short response, whose rounding does not even out; the longest of the batch is
    looked at.
    """
    rollout, split = made(tiny_llama, dtype=dtype), Split()
    split.loss_tokens = np.array([1, tokens, 1, 1])
    split.total_tokens = split.prompt_tokens + split.loss_tokens
    monkeypatch.setattr(
        split, "tokens", lambda row: np.arange(2, 2 + split.total_tokens[row]).astype(np.uint32)
    )
    rollout.split, rollout.longest, rollout.on_gpu = split, 200, on_gpu
    asked, log_probs = [], TransformersGenerator.log_probs

    def off(self: TransformersGenerator, sequences: Any, starts: Any) -> Any:
        found = log_probs(self, sequences, starts)
        asked.append(len(found[0]))
        return [one + share * allowed for one in found]

    monkeypatch.setattr(TransformersGenerator, "log_probs", off)
    if abs(share) < 1:
        write(rollout, 0)
    else:
        with pytest.raises(ResourceError, match="it did not take the new weights"):
            write(rollout, 0)
    assert asked == [tokens]


def test_a_writer_goes_on_with_the_weights_that_it_had(tiny_llama: Path, tmp_path: Path) -> None:
    """Steps 4 to 7 write with the weights of step 4; the run stops before step 6, when the student
    is two steps further.
    """
    first, second, third = (made(tiny_llama, every=4) for _ in range(3))
    write(first, 4)
    learn(first)
    save = first.snapshot(6)
    expected = write(first, 6), write(first, 8)
    assert save(tmp_path) == [tmp_path / WRITER]
    for later in (second, third):
        learn(later)
    second.restore(tmp_path)
    assert write(second, 6) == expected[0] and second.cost.staleness == 2
    assert second.snapshot(7)(tmp_path) and not second.snapshot(8)(tmp_path)
    assert write(second, 8) == expected[1] and second.cost.staleness == 0
    third.restore(tmp_path / "nothing")
    assert write(third, 6) != expected[0]


def test_where_each_step_brings_new_weights_nothing_is_kept(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rollout = made(tiny_llama)
    write(rollout, 4)
    assert (
        rollout.held == {}
        and rollout.snapshot(5)(tmp_path) == []
        and list(tmp_path.iterdir()) == []
    )


class Level2:
    """A writer whose engine drops its weights when it rests, as one on a GPU: writes down what it
    is asked.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        self.calls.append("refresh")

    def write(self, prompts: list[list[int]], sampling: Any) -> list[list[int]]:
        self.calls.append("write")
        return [[5, 0]] * len(prompts)

    def rest(self) -> None:
        self.calls.append("rest")


@pytest.mark.parametrize("every", [1, 4])
def test_an_engine_rests_whenever_nothing_is_asked_of_it(
    every: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each write and after a resume; and one that dropped its weights gets them for a second
    write of the same step.
    """
    rollout = made(tiny_llama, every=every)
    writer: Any = Level2()
    rollout.config = rollout.config.model_copy(update={"rollout": "vllm"})
    monkeypatch.setattr(rollout, "on_gpu", True)
    monkeypatch.setattr(rollout, "_compare", lambda row: None)
    monkeypatch.setattr(rollout, "_open", lambda settings: writer)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    write(rollout, 0)
    write(rollout, 0)
    whole = ["refresh", "write", "rest"]
    assert writer.calls == (whole + whole if every == 1 else whole + whole[1:])
    torch.save({"step": 0, "weights": {}}, tmp_path / WRITER)
    rollout.restore(tmp_path)
    assert writer.calls[-2:] == ["refresh", "rest"]
