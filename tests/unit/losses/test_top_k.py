"""Top-k records: the k largest probabilities, the loss over k + 1 outcomes, and the truncation
error.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocl_ds.errors import RecipeError
from pocl_ds.losses import fused_inputs
from pocl_ds.losses.divergences import DIVERGENCES, divergence_options
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.fused_inputs import ChunkSizes
from pocl_ds.losses.record_codec import MAX_IDS
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap

TEMPERATURES = (1.0, 4 / 3, 5 / 3, 2.0)


def logits_of(tokens: int, size: int, seed: int, spread: float, masked: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, size, generator=source, dtype=torch.float64) * spread
    logits[:, torch.randperm(size, generator=source)[:masked]] = -math.inf
    return logits


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 4),
    size=st.sampled_from([5, 64, 65_536, 65_537, 151_936]),
    k=st.integers(1, 9),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.1, 3.0, 1e4]),
    masked=st.integers(0, 3),
)
def test_a_record_holds_the_largest_probabilities_and_the_mass_of_all_others(
    tokens: int, size: int, k: int, seed: int, spread: float, masked: int
) -> None:
    k = min(k, size - masked)
    logits, codec = logits_of(tokens, size, seed, spread, masked), TopKCodec(k, size, TEMPERATURES)
    records = codec.encode(logits)
    assert records.dtype == torch.uint8 and records.shape == (tokens, codec.bytes)
    for temperature in TEMPERATURES:
        ids, log_p = codec.decode(records, temperature)
        exact = torch.log_softmax(logits / temperature, -1)
        largest = logits.topk(k, -1).values
        assert torch.equal(logits.gather(-1, ids), largest.float().double()) or torch.allclose(
            logits.gather(-1, ids), largest
        )
        span = largest[:, :1] - largest[:, -1:]
        # Half a quantization step in either direction, and rounding in float32.
        step = span / 65_535 / temperature + 1e-5 + 1e-6 * largest.abs().max()
        assert bool(((log_p[:, :-1] - exact.gather(-1, ids)).abs() <= step).all())
        other_mass = exact.scatter(-1, ids, -math.inf).exp().sum(-1)
        assert torch.allclose(log_p[:, -1].double().exp(), other_mass, atol=2e-4)
        assert torch.allclose(log_p.exp().sum(-1), torch.ones(tokens))


def test_a_record_is_small() -> None:
    assert TopKCodec(64, 151_936, TEMPERATURES).bytes <= 300  # of logits: 303,872 in bfloat16
    assert TopKCodec(64, 50_257, TEMPERATURES).bytes < TopKCodec(64, 151_936, TEMPERATURES).bytes


def loss_over_outcomes(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    terms: LossTerms,
    ids: VocabMap,
    codec: TopKCodec,
    records: Tensor,
) -> Any:
    """The loss over k ids and any other, by autograd over the complete logits."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)[:, : ids.size] * head.scale
    logits = ids.mask(head.soft_cap * torch.tanh(logits / head.soft_cap))
    stored, log_p = codec.decode(records, terms.temperature)
    q = torch.softmax(logits / terms.temperature, -1)
    top = q.gather(-1, stored)
    other_mass = q.scatter(-1, stored, 0.0).sum(-1, keepdim=True)
    log_q = torch.cat([top, other_mass], -1).log()
    options = divergence_options(terms.name, terms.options)
    kd = DIVERGENCES[terms.name](log_p.double(), log_q, **options).sum() * terms.temperature**2
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return terms.sft_ratio * ce + (1 - terms.sft_ratio) * kd, kd, ce


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 5 / 3])
@pytest.mark.parametrize("sft_ratio", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(3, 2), (100, 100)])
def test_the_loss_covers_k_ids_and_any_other(
    name: str,
    temperature: float,
    sft_ratio: float,
    sizes: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
    source = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    head, hidden = (
        OutputHead(nn.Parameter(draw(40, 8)), nn.Parameter(draw(40)), 0.5, 7.0),
        draw(11, 8).requires_grad_(),
    )
    masked = torch.zeros(38, dtype=torch.bool)
    masked[[3, 37]] = True
    ids, codec, labels = (
        VocabMap(38, masked),
        TopKCodec(6, 38, TEMPERATURES),
        torch.randint(4, 37, (11,), generator=source),
    )
    records = codec.encode(ids.mask(3 * draw(11, 38)))
    terms = LossTerms(name, temperature=temperature, sft_ratio=sft_ratio)
    expected = loss_over_outcomes(hidden, head, labels, terms, ids, codec, records)
    leaves = [hidden, head.weight, head.bias]
    expected_gradients = torch.autograd.grad(expected[0], leaves)
    actual = loss_sums(
        hidden, head, labels, terms, vocab=ids, teacher_hidden=records, teacher_head=codec
    )
    gradients = torch.autograd.grad(actual[0], leaves)
    for value, reference in zip(
        (*actual, *gradients), (*expected, *expected_gradients), strict=True
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_divergence_grows_with_k_up_to_the_full_one(temperature: float) -> None:
    source = torch.Generator().manual_seed(2)
    hidden, labels = (
        torch.randn(9, 8, generator=source),
        torch.randint(0, 30, (9,), generator=source),
    )
    head, logits = (
        OutputHead(nn.Parameter(torch.randn(30, 8, generator=source)), None, 1.0, None),
        logits_of(9, 30, 4, 2.0).float(),
    )
    identity, terms = (
        OutputHead(nn.Parameter(torch.eye(30)), None, 1.0, None),
        LossTerms("fkl", temperature=temperature),
    )
    full = loss_sums(
        hidden,
        head,
        labels,
        terms,
        vocab=VocabMap(30),
        teacher_hidden=logits,
        teacher_head=identity,
    )[1]
    stored = [
        float(
            loss_sums(
                hidden,
                head,
                labels,
                terms,
                vocab=VocabMap(30),
                teacher_hidden=codec.encode(logits),
                teacher_head=codec,
            )[1]
        )
        for codec in (TopKCodec(k, 30, TEMPERATURES) for k in (1, 4, 12, 30))
    ]
    assert stored == sorted(stored) and stored[0] < 0.9 * float(full)
    assert stored[-1] == pytest.approx(float(full), rel=1e-4)


def test_truncation_error_equals_its_definition() -> None:
    logits, codec = logits_of(7, 50, 6, 2.0, masked=4), TopKCodec(5, 50, TEMPERATURES)
    actual = codec.error_sums(logits, codec.encode(logits))
    for temperature, (mass, divergence) in zip(TEMPERATURES, actual.tolist(), strict=True):
        p = torch.softmax(logits / temperature, -1)
        stored = logits.topk(5, -1).indices
        even = (1 - p.gather(-1, stored).sum(-1)) / (46 - 5)
        spread = torch.where(p > 0, even[:, None], 0.0).scatter(-1, stored, p.gather(-1, stored))
        assert mass == pytest.approx(float(spread.scatter(-1, stored, 0.0).sum()), rel=1e-3)
        assert divergence == pytest.approx(
            float((p * (p / spread).log()).nan_to_num().sum()), rel=1e-2
        )


def test_unsupported_sizes_and_temperatures_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"teacher_cache\.top_k=64 is more than the 40 ids"):
        TopKCodec(64, 50, TEMPERATURES).validate(40)
    with pytest.raises(RecipeError, match="mode=cached_hidden_states"):
        TopKCodec(64, MAX_IDS + 1, TEMPERATURES).validate(MAX_IDS)
    codec = TopKCodec(2, 10, (1.0,))
    with pytest.raises(RecipeError, match=r"hold temperature 1, not 1\.5"):
        codec.decode(codec.encode(torch.randn(3, 10)), 1.5)
