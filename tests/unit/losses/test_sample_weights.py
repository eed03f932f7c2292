"""Weights of samples: the total and every gradient carry them, the logged sums do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from complete_logits import IDS, SAMPLE_OF_TOKEN, SAMPLES, TOKENS, Case, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocl_ds.data.batches import Batch
from pocl_ds.errors import RecipeError
from pocl_ds.losses import FusedLinearDistillationLoss, fused_inputs
from pocl_ds.losses.divergences import DIVERGENCES
from pocl_ds.losses.fused_head import LossHead, loss_sums
from pocl_ds.losses.fused_inputs import ChunkSizes
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.models.heads import HeadMixture


@pytest.mark.parametrize("name", [*DIVERGENCES, "sft"])
@given(
    weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=SAMPLES, max_size=SAMPLES),
    sizes=st.sampled_from([(1, 1), (5, 2), (100, 100)]),
    temperature=st.sampled_from([1.0, 1.6]),
    sft_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    tied=st.booleans(),
)
@settings(max_examples=8, deadline=None, database=None, derandomize=True)
def test_equals_the_weighted_sum_over_complete_logits(
    name: str,
    weights: list[float],
    sizes: tuple[int, int],
    temperature: float,
    sft_ratio: float,
    tied: bool,
) -> None:
    case, terms = Case(tied=tied), LossTerms(name, temperature, sft_ratio)
    kd, ce = case.by_token(terms)
    by_token = torch.tensor(weights, dtype=torch.float64)[SAMPLE_OF_TOKEN]
    alpha = terms.ce_weight
    total = (by_token * (alpha * ce + (1 - alpha) * kd)).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
        actual = case.sums(terms, torch.tensor(weights))
    assert_close(actual, (total, kd.sum(), ce.sum()))
    assert_close(case.gradients(3 * actual[0]), case.gradients(3 * total))


@pytest.mark.parametrize("name", [*DIVERGENCES, "sft"])
def test_weight_0_adds_exactly_no_gradient_and_weights_of_1_change_nothing(name: str) -> None:
    case, terms = Case(), LossTerms(name, 1.6, 0.3)
    plain = case.sums(terms, None)
    assert_close(case.sums(terms, torch.ones(SAMPLES)), plain)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    gradient = case.gradients(case.sums(terms, weights)[0])[0]
    absent = weights[SAMPLE_OF_TOKEN] == 0
    assert (gradient[absent] == 0).all()
    assert_close([gradient[~absent]], [case.gradients(plain[0])[0][~absent]])
    assert (case.gradients(case.sums(terms, torch.zeros(SAMPLES))[0])[1] == 0).all()


@pytest.mark.parametrize("kind", ["records", "ensemble"])
def test_other_teachers_equal_one_sample_at_a_time(kind: str) -> None:
    case, terms = Case(), LossTerms("srkl", 1.6, 0.3)
    head: Any = TopKCodec(6, IDS, (1.0, 1.6))
    states = head.encode(case.logits()[1].float()) if kind == "records" else None
    if states is None:
        head = HeadMixture((case.teacher, case.teacher), (0.75, 0.25))
        states = torch.cat([case.teacher_hidden, case.teacher_hidden.flip(0)], -1)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.25])
    actual = case.sums(terms, weights, teacher_hidden=states, teacher_head=head)
    expected = []
    for sample in range(SAMPLES):
        own = sample == SAMPLE_OF_TOKEN
        expected.append(
            loss_sums(
                case.hidden[own],
                case.student,
                case.labels[own],
                terms,
                vocab=case.vocab,
                teacher_hidden=states[own],
                teacher_head=head,
            )
        )
    total, kd, ce = (torch.stack(part) for part in zip(*expected, strict=True))
    assert_close(actual, ((weights * total).sum(), kd.sum(), ce.sum()))
    gradients = case.gradients((weights.double() * total).sum())
    assert_close(case.gradients(actual[0]), gradients)


def test_the_module_reads_the_weights_of_the_batch_wherever_it_goes() -> None:
    case, terms = Case(), LossTerms("rkl", 1.6, 0.3)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.25])
    empty, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(TOKENS, dtype=torch.int64)
    batch = Batch(empty, None, None, None, none, case.labels, SAMPLE_OF_TOKEN, (0, 1, 2, 3), "x")
    module = LossHead(case.student, case.vocab, 1 << 20)
    for weighted, expected in (
        (replace(batch, sample_weights=weights).to(torch.device("cpu")), weights),
        (batch, None),
    ):
        actual = module(case.hidden, weighted, terms, case.teacher_hidden, case.teacher)
        assert torch.equal(torch.stack(actual), torch.stack(case.sums(terms, expected)))
    doubled = replace(batch, sample_weights=weights).map_tensors(lambda tensor: 2 * tensor)
    assert doubled.sample_weights is not None and doubled.sample_weights.tolist() == [1, 4, 0, 2.5]
    one = replace(batch, sample_weights=weights).of_sample(1)
    own = SAMPLE_OF_TOKEN == 1
    actual = module(case.hidden[own], one, terms, case.teacher_hidden[own], case.teacher)
    plain = module(
        case.hidden[own], batch.of_sample(1), terms, case.teacher_hidden[own], case.teacher
    )
    assert_close(actual, (2 * plain[0], *plain[1:]))


def test_the_function_on_plain_tensors() -> None:
    source = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    hidden, heads = draw(2, 5, 6), [draw(20, 6), None, None]
    labels = torch.tensor([[-100, 3, 4, -100, 5], [1, -100, 2, -100, -100]])
    loss = FusedLinearDistillationLoss("sft", reduction="sum")
    one = [loss(hidden[i], *heads, labels[i]) for i in range(2)]
    both = loss(hidden, *heads, labels, sample_weights=torch.tensor([0.5, 3.0]))
    assert_close([both, loss(hidden, *heads, labels)], [0.5 * one[0] + 3 * one[1], sum(one)])


@pytest.mark.parametrize("weights", [torch.ones(4, 1), torch.tensor(2.0)])
def test_weights_need_one_number_per_sample(weights: Tensor) -> None:
    with pytest.raises(RecipeError, match="give one number per sample"):
        Case().sums(LossTerms("fkl"), weights)
    with pytest.raises(RecipeError, match="or sample_of_token"):
        Case().sums(LossTerms("fkl"), torch.ones(4), sample_of_token=None)
    one = Case().sums(LossTerms("fkl"), torch.tensor([2.0]), sample_of_token=None)
    assert_close([one[0]], [2 * one[1]])
