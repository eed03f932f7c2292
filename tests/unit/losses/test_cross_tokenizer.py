"""Losses across tokenizers against a direct computation: a loop over spans, all logits at once,
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocl_ds.data.batches import Batch, TeacherView
from pocl_ds.losses import fused_inputs
from pocl_ds.losses.cross_tokenizer import (
    CrossTokenizerTeacher,
    alm,
    paired_teacher_tokens,
    uld_with_gradient,
)
from pocl_ds.losses.fused_head import LossHead, loss_sums
from pocl_ds.losses.fused_inputs import ChunkSizes
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap

# Two samples: the span of each student token and of each teacher token. The second sample is
# truncated for the student.
STUDENT_SPANS = torch.tensor([0, 0, 1, 2, 2, 3, 4, -1])
TEACHER_SPANS = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4, -1, -1])
SAMPLES = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])


def part(sample: Tensor, labels: Tensor, translated: TeacherView | None = None) -> Batch:
    empty = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(empty, None, None, None, labels, labels, sample, (0, 1), "train", translated)


class Case:
    """Heads of different sizes and widths, hidden states, and labels, all float64."""

    def __init__(self, *, masked: bool = True) -> None:
        generator = torch.Generator().manual_seed(7)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.student = OutputHead(nn.Parameter(draw(20, 6)), nn.Parameter(draw(20)), 0.7, 9.0)
        self.teacher = OutputHead(nn.Parameter(draw(31, 5)), None, 1.0, None)
        self.hidden, self.teacher_hidden = draw(8, 6).requires_grad_(), draw(10, 5)
        self.labels = torch.randint(0, 18, (8,), generator=generator)
        teacher_labels = torch.randint(0, 30, (10,), generator=generator)
        self.ids = VocabMap(20, torch.arange(20) >= 18) if masked else VocabMap(20)
        self.teacher_ids = VocabMap(31, torch.arange(31) >= 30) if masked else VocabMap(31)
        self.translated = TeacherView(
            part(SAMPLES[1], teacher_labels), STUDENT_SPANS, TEACHER_SPANS, 5
        )
        self.batch = part(SAMPLES[0], self.labels, self.translated)
        self.leaves = [self.hidden, self.student.weight, self.student.bias]

    def logits(self) -> tuple[Tensor, Tensor]:
        cap, bias = self.student.soft_cap, self.student.bias
        assert cap is not None and bias is not None
        student = cap * torch.tanh(
            (self.hidden @ self.student.weight.T + bias) * self.student.scale / cap
        )
        teacher = self.teacher_hidden @ self.teacher.weight.T
        masks = self.ids.masked, self.teacher_ids.masked
        if masks[0] is not None and masks[1] is not None:
            student, teacher = (
                student.masked_fill(masks[0], -math.inf),
                teacher.masked_fill(masks[1], -math.inf),
            )
        return student, teacher

    def actual(self, terms: LossTerms, *, by_position: bool = False) -> Any:
        teacher = CrossTokenizerTeacher(
            self.teacher_hidden,
            self.teacher,
            self.teacher_ids,
            self.translated.batch.labels,
            self.translated,
        )
        rows = paired_teacher_tokens(self.batch, self.translated, by_position=by_position)
        return loss_sums(
            self.hidden,
            self.student,
            self.labels,
            terms,
            vocab=self.ids,
            teacher_hidden=rows,
            teacher_head=teacher,
        )


def direct_uld(case: Case, temperature: float, pairing: list[tuple[int, int]]) -> Tensor:
    student, teacher = case.logits()
    total = torch.zeros((), dtype=torch.float64)
    for token, teacher_token in pairing:
        q = sorted((student[token] / temperature).softmax(-1), key=lambda x: -float(x))
        p = sorted((teacher[teacher_token] / temperature).softmax(-1), key=lambda x: -float(x))
        zero = torch.zeros((), dtype=torch.float64)
        width = max(len(p), len(q))
        for a, b in zip(p + [zero] * (width - len(p)), q + [zero] * (width - len(q)), strict=True):
            total = total + (a - b).abs()
    return total


def direct_alm(case: Case, temperature: float, spans: Iterable[int] = range(5)) -> Tensor:
    student, teacher = (side.log_softmax(-1) for side in case.logits())
    total = torch.zeros((), dtype=torch.float64)
    for span in spans:
        q = p = torch.zeros((), dtype=torch.float64)
        for token in range(len(STUDENT_SPANS)):
            q = q + student[token, case.labels[token]] if STUDENT_SPANS[token] == span else q
        for token in range(len(TEACHER_SPANS)):
            p = (
                p + teacher[token, case.translated.batch.labels[token]]
                if TEACHER_SPANS[token] == span
                else p
            )
        p, q = (p / temperature).exp(), (q / temperature).exp()
        total = total + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return total


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (100, 100)])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("sft_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["uld", "uld by position", "alm"])
def test_equals_the_direct_computation(
    name: str,
    sft_ratio: float,
    temperature: float,
    sizes: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
    case, by_position = Case(), name.endswith("position")
    aligned = [(0, 0), (2, 1), (3, 4), (5, 5), (6, 7)]
    placed = [*((i, i) for i in range(6)), (6, 7), (7, 8)]
    kd = temperature**2 * (
        direct_alm(case, temperature)
        if name == "alm"
        else direct_uld(case, temperature, placed if by_position else aligned)
    )
    ce = torch.nn.functional.cross_entropy(case.logits()[0], case.labels, reduction="sum")
    expected = sft_ratio * ce + (1 - sft_ratio) * kd
    terms = LossTerms(name.split()[0], temperature=temperature, sft_ratio=sft_ratio)
    actual = case.actual(terms, by_position=by_position)
    expected_gradients, gradients = (
        torch.autograd.grad(3 * total, case.leaves) for total in (expected, actual[0])
    )
    for value, reference in zip(
        (*actual, *gradients), (expected, kd, ce, *expected_gradients), strict=True
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [("uld", {}), ("uld", {"by_position": True}), ("alm", {})]
)
def test_the_module_compares_a_translated_batch_with_the_teachers_own_tokens(
    name: str, options: dict[str, Any], masked: bool
) -> None:
    case, terms = (
        Case(masked=masked),
        LossTerms(name, temperature=1.7, sft_ratio=0.3, options=options),
    )
    module = LossHead(
        case.student, VocabMap(20, case.ids.masked, teacher_masked=case.teacher_ids.masked), 1 << 20
    )
    actual = module(case.hidden, case.batch, terms, case.teacher_hidden, case.teacher)
    assert torch.equal(
        torch.stack(actual), torch.stack(case.actual(terms, by_position=bool(options)))
    )


@pytest.mark.parametrize("name", ["uld", "alm"])
@pytest.mark.parametrize("sft_ratio", [0.0, 0.3])
def test_weights_of_samples(name: str, sft_ratio: float) -> None:
    """The total carries them, the logged sums do not; samples 0 and 1 have 6 and 2 tokens."""
    case, weights = Case(), (0.5, 3.0)
    pairs = ([(0, 0), (2, 1), (3, 4), (5, 5)], [(6, 7)])
    ce = torch.nn.functional.cross_entropy(case.logits()[0], case.labels, reduction="none")
    ces = [ce[SAMPLES[0] == sample].sum() for sample in range(2)]
    kds = [
        1.7**2
        * (
            direct_alm(case, 1.7, (range(4), [4])[sample])
            if name == "alm"
            else direct_uld(case, 1.7, pairs[sample])
        )
        for sample in range(2)
    ]
    expected = sum(
        weight * (sft_ratio * ce + (1 - sft_ratio) * kd)
        for weight, kd, ce in zip(weights, kds, ces, strict=True)
    )
    module = LossHead(
        case.student, VocabMap(20, case.ids.masked, teacher_masked=case.teacher_ids.masked), 1 << 20
    )
    batch, terms = replace(case.batch, sample_weights=torch.tensor(weights)), LossTerms(name, 1.7)
    terms = replace(terms, sft_ratio=sft_ratio)
    actual = module(case.hidden, batch, terms, case.teacher_hidden, case.teacher)
    expected_gradients, gradients = (
        torch.autograd.grad(total, case.leaves) for total in (expected, actual[0])
    )
    for value, reference in zip(
        (*actual, *gradients), (expected, sum(kds), sum(ces), *expected_gradients), strict=True
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-9, atol=1e-10)  # type: ignore[union-attr]


def test_equal_distributions_have_no_distance_in_any_order_of_ids() -> None:
    log_p = torch.randn(
        4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).log_softmax(-1)
    value, gradient = uld_with_gradient(log_p, log_p[:, torch.randperm(9)])
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
    assert (alm(log_p[:, 0], log_p[:, 0], 1.5) == 0).all()


def test_a_certain_span_stays_finite() -> None:
    log_q = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    value = alm(torch.tensor([0.0, -0.5, 0.0]), log_q, 1.0)
    value.sum().backward()
    assert (
        torch.isfinite(value).all() and log_q.grad is not None and torch.isfinite(log_q.grad).all()
    )


def test_a_teacher_without_tokens_adds_nothing() -> None:
    case = Case()
    none = torch.full_like(STUDENT_SPANS, -1), torch.full_like(TEACHER_SPANS, -1)
    case.translated = TeacherView(case.translated.batch, *none, 0)
    for name in ("uld", "alm"):
        total, kd, ce = case.actual(LossTerms(name, sft_ratio=0.25))
        assert kd == 0 and torch.isclose(total, 0.25 * ce)
