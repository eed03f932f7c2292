"""Weights of thoughts in the loss: the right tokens get them, and the loss is their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from pocl_ds.config import TrainConfig
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.thought_spans import ThoughtFinder
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts.policies import OffPolicy
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.step_batches import StepBatches
from pocl_ds.training.student import Student
from pocl_ds.training.thought_weights import ThoughtWeights

TOKENIZER: Any = tiny_models.make_tokenizer()
PROMPT = "What is it?"
RESPONSES = [
    "<think>two and two</think>four",
    "a plain answer",
    "<think>it never ends",
    "<think></think>no",
]


def make_split(folder: Path) -> TokenizedSplit:
    prompt = TOKENIZER(PROMPT).input_ids
    samples = [[*prompt, *TOKENIZER(text).input_ids] for text in RESPONSES]
    names = [f"s{number}" for number in range(len(samples))]
    save_split(folder, "train", names, samples, [len(prompt)] * len(samples))
    return TokenizedSplit.open(folder, "train")


def thoughts_of(split: TokenizedSplit) -> list[int]:
    """Tokens of each thought with its tags, counted in the texts."""
    thoughts = ["<think>two and two</think>", "", RESPONSES[2], "<think></think>"]
    counts = []
    for row, text in enumerate(thoughts):
        ids = split.tokens(row)[int(split.prompt_tokens[row]) :].tolist()
        prefixes = (n for n in range(len(ids) + 1) if TOKENIZER.decode(ids[:n]).startswith(text))
        counts.append(next(prefixes))
    return counts


def test_tokens_of_thoughts_have_the_weight(tmp_path: Path) -> None:
    split, weights = make_split(tmp_path), ThoughtWeights(ThoughtFinder(TOKENIZER), 0.25)
    counts = thoughts_of(split)
    assert counts[0] > 4 and counts[1] == 0 and counts[2] == split.loss_tokens[2]
    for row, count in enumerate(counts):
        loss_tokens = int(split.loss_tokens[row])
        expected = [0.25] * count + [1.0] * (loss_tokens - count)
        assert weights.of_tokens(split, row).tolist() == expected
    for _ in range(2):  # counted, then remembered
        total = weights.total(split, np.array([0, 2]))
        assert total == 0.25 * (counts[0] + counts[2]) + split.loss_tokens[0] - counts[0]
    # Responses of the student are counted too.
    generated = GeneratedBatch(
        rows=np.array([2]),
        ids=split.ids[[2]],
        prompt_tokens=split.prompt_tokens[[2]],
        sequences=[split.tokens(2)],
    )
    assert weights.of_tokens(generated, 0).tolist() == [0.25] * counts[2]
    assert weights.total(generated, np.array([0])) == 0.25 * counts[2]


def step_gradients(
    split: TokenizedSplit, model: Any, weight: float | None, *, micro_batch: int, packed: bool
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of an optimizer step over all samples, as the trainer computes them, under
    a cached teacher.
    """
    plan = single_stage_plan(
        np.arange(len(split)), steps=1, batch_size=len(split), temperature=1.5, sft_ratio=0.3
    )
    train = TrainConfig(batch_size=len(split), micro_batch_size=micro_batch)
    data = TrainingData(split, None, Layout(packed, 0.0), micro_batch)
    if weight is not None:
        data.thought_weights = ThoughtWeights(ThoughtFinder(TOKENIZER), weight)
    size = model.config.vocab_size
    engine = TorchEngine(Student(model, VocabMap(size), chunk_bytes=1 << 20).train(), train)
    batches = StepBatches(
        ResponseSource(OffPolicy()),
        TrainingSchedule(plan, Sampler(plan, 0), train),
        data,
        TrainingModels(engine, NoTeacher()),
    )
    codec, terms, total = TopKCodec(8, size, (1.0, 1.5)), LossTerms("fkl", 1.5, 0.3), 0.0
    step = batches.select(Sampler(plan, 0).position(0))
    for batch in batches.micro_batches(step):
        assert weight is not None or batch.token_weights is None
        logits = torch.stack([teacher_logits(int(label), size) for label in batch.labels])
        loss, _, _ = engine.forward(batch, terms, codec.encode(logits), codec)
        engine.backward(loss, normalizer=step.loss_weight, is_last=False)
        total += float(loss.detach()) / step.loss_weight
    batches.close()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return total, gradients


def teacher_logits(label: int, size: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(label)
    return 3 * torch.randn(size, generator=source)


@pytest.mark.parametrize(
    ("weight", "micro_batch", "packed"), [(0.25, 2, True), (3.0, 1, False), (0.0, 4, True)]
)
def test_the_loss_is_the_weighted_mean_over_the_tokens(
    weight: float, micro_batch: int, packed: bool, tmp_path: Path, tiny_llama: Path
) -> None:
    """Against float64, one token at a time, from the counts of tokens in the texts."""
    split, model = make_split(tmp_path), load_model(str(tiny_llama), dropout=0.0)
    actual, gradients = step_gradients(split, model, weight, micro_batch=micro_batch, packed=packed)
    plain: Any = load_model(str(tiny_llama), dropout=0.0).double()
    size = plain.config.vocab_size
    codec = TopKCodec(8, size, (1.0, 1.5))
    losses, weights = [], []
    for row, count in enumerate(thoughts_of(split)):
        ids, start = split.tokens(row).astype(np.int64), int(split.prompt_tokens[row])
        logits = plain(input_ids=torch.from_numpy(ids)[None]).logits[0]
        for place in range(start, len(ids)):
            log_q, label = logits[place - 1].log_softmax(-1), int(ids[place])
            record = codec.encode(teacher_logits(label, size)[None])
            log_q_at = (logits[place - 1] / 1.5).log_softmax(-1)
            kd = kept_divergence(codec, record, log_q_at)
            losses.append(0.3 * -log_q[label] + 0.7 * 1.5**2 * kd)
            weights.append(weight if place - start < count else 1.0)
    by_token = torch.tensor(weights, dtype=torch.float64)
    expected = (by_token * torch.stack(losses)).sum() / by_token.sum()
    expected.backward()
    assert actual == pytest.approx(float(expected), rel=1e-5)
    scale = max(float(p.grad.abs().max()) for p in plain.parameters())
    for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
        assert float((gradient.double() - parameter.grad).abs().max()) < 2e-5 * scale


def kept_divergence(codec: TopKCodec, record: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Forward KL at temperature 1.5 of what a record stores, differentiated by autograd."""
    leaf = log_q.detach()[None].clone()
    value, gradient = codec.divergence(
        record, leaf, "fkl", {}, 1.5, lambda: torch.empty_like(leaf), True
    )
    # d D / d logits, which are log_q up to a constant
    slope = gradient[0].detach()
    return value[0].detach() + ((log_q - log_q.detach()) * slope).sum()


def test_a_weight_of_1_costs_nothing_and_a_step_of_thoughts_alone_has_no_loss(
    tmp_path: Path, tiny_llama: Path
) -> None:
    split, model = make_split(tmp_path), load_model(str(tiny_llama), dropout=0.0)
    data = TrainingData(split, None, Layout(True, 0.0), 1)
    assert data.loss_weight(split, np.arange(4)) == split.loss_tokens.sum()
    data.thought_weights = ThoughtWeights(ThoughtFinder(TOKENIZER), 0.0)
    assert data.loss_weight(split, np.array([2])) == 1.0
    assert data.stage(split, np.array([0])).batch.token_weights is None  # as in validation
    ones = step_gradients(split, model, 1.0, micro_batch=2, packed=True)
    none = step_gradients(split, model, None, micro_batch=2, packed=True)
    assert ones[0] == none[0]
    assert all(a.equal(b) for a, b in zip(ones[1], none[1], strict=True))
