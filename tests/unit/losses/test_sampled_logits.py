"""Sampled records: draws, an unbiased value and gradient of the forward KL, and bad inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from pocl_ds.errors import RecipeError
from pocl_ds.losses import fused_inputs, sampled_logits
from pocl_ds.losses.divergences import DIVERGENCES, MASKED, fkl, log_probabilities
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.fused_inputs import ChunkSizes
from pocl_ds.losses.record_codec import DISTANCE_STEPS, MAX_IDS
from pocl_ds.losses.sampled_logits import SampledCodec, stratified_points
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime.hashing import token_keys

TEMPERATURES = (1.0, 4 / 3, 5 / 3, 2.0)
PLANS = [(1.0,), (1.0, 2.0), TEMPERATURES]


def logits_of(tokens: int, size: int, seed: int, spread: float, masked: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, size, generator=source, dtype=torch.float64) * spread
    logits[:, torch.randperm(size, generator=source)[:masked]] = -math.inf
    return logits


def keys_of(tokens: int, seed: int = 0) -> NDArray[np.uint64]:
    return token_keys(seed, [b"sample"], [tokens])


def value_and_gradient(
    codec: SampledCodec, records: Tensor, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The estimate of the forward KL, and its gradient in the student's scaled logits."""
    log_q = log_probabilities(logits, temperature, torch.float64)
    value, gradient = codec.divergence(
        records, log_q, "fkl", {}, temperature, lambda: torch.empty_like(log_q), True
    )
    assert gradient is not None
    return value.sum(), gradient


def estimate_of(codec: SampledCodec, records: Tensor, temperature: float) -> Tensor:
    """p_hat [n, v]."""
    ids, parts, _ = codec.decode(records, temperature)
    return torch.zeros(len(ids), codec.size).scatter_add_(-1, ids, parts)


def all_draws(proposal: Tensor, count: int) -> list[tuple[float, list[float]]]:
    """Every outcome of `count` stratified draws: its probability, and points that lead to it."""
    bounds = [0.0, *proposal.cumsum(0).tolist()]
    parts = []
    for part in range(count):
        low, high = part / count, (part + 1) / count
        overlaps = [
            (max(a, low), min(b, high))
            for a, b in itertools.pairwise(bounds)
            if min(b, high) > max(a, low)
        ]
        parts.append([((b - a) * count, (a + b) / 2) for a, b in overlaps])
    return [
        (math.prod(p for p, _ in outcome), [point for _, point in outcome])
        for outcome in itertools.product(*parts)
    ]


@pytest.mark.parametrize("temperatures", PLANS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("masked", [0, 1])
def test_the_expectation_over_all_draws_is_the_forward_kl_and_its_gradient(
    temperatures: tuple[float, ...], count: int, masked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: the outcomes are enumerated, not sampled. What remains is the rounding of logits."""
    teacher = logits_of(1, 3 + masked, 1, 1.5, masked)
    codec = SampledCodec(count, 3 + masked, temperatures)
    student = logits_of(1, 3 + masked, 2, 1.0).masked_fill(teacher == -math.inf, -math.inf)
    proposal = sum(torch.softmax(teacher[0] / value, -1) for value in temperatures)
    assert isinstance(proposal, Tensor)
    outcomes = all_draws(proposal / len(temperatures), count)
    assert len(outcomes) > 1 and sum(p for p, _ in outcomes) == pytest.approx(1)
    for temperature in temperatures:
        value, gradient, mass = torch.zeros(()), torch.zeros(1, codec.size), 0.0
        for probability, points in outcomes:
            monkeypatch.setattr(
                sampled_logits, "stratified_points", lambda *_, points=points: np.array([points])
            )
            records = codec.encode(teacher, keys_of(1))
            one_value, one_gradient = value_and_gradient(codec, records, student, temperature)
            value, gradient = value + probability * one_value, gradient + probability * one_gradient
            mass += probability * float(estimate_of(codec, records, temperature).sum())
        log_p = log_probabilities(teacher, temperature, torch.float64)
        log_q = log_probabilities(student, temperature, torch.float64)
        tolerance = 1e-6 if len(temperatures) == 1 else 3e-5
        assert mass == pytest.approx(1, abs=tolerance)
        torch.testing.assert_close(value, fkl(log_p, log_q)[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(gradient, log_q.exp() - log_p.exp(), rtol=0, atol=tolerance)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 4),
    size=st.sampled_from([5, 64, 65_536, 65_537, 151_936]),
    count=st.integers(1, 9),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.1, 3.0, 1e4]),
    masked=st.integers(0, 4),
    temperatures=st.sampled_from(PLANS),
)
def test_a_record_holds_ids_and_their_weights(
    tokens: int,
    size: int,
    count: int,
    seed: int,
    spread: float,
    masked: int,
    temperatures: tuple[float, ...],
) -> None:
    logits, codec = (
        logits_of(tokens, size, seed, spread, masked),
        SampledCodec(count, size, temperatures),
    )
    records = codec.encode(logits, keys_of(tokens))
    assert records.dtype == torch.uint8 and records.shape == (tokens, codec.bytes)
    exact = {value: torch.softmax(logits / value, -1) for value in temperatures}
    proposal = torch.stack(list(exact.values())).mean(0)
    for temperature in temperatures:
        ids, parts, teacher_sum = codec.decode(records, temperature)
        assert bool((ids.diff(dim=-1) >= 0).all()) and bool((logits.gather(-1, ids) > -1e9).all())
        weights = (exact[temperature] / proposal).gather(-1, ids)
        # Half a step of the distances, times the largest difference of inverse temperatures.
        reach = (logits.amax(-1, keepdim=True) - logits.gather(-1, ids)).amax(-1, keepdim=True)
        bound = torch.expm1(reach / (2 * DISTANCE_STEPS)) + 1e-5 + 1e-6 * reach
        assert bool(((parts * count - weights).abs() <= bound * weights + 1e-6).all())
        assert float(parts.max()) <= len(temperatures) / count * (1 + 1e-5)
        assert bool(torch.isfinite(teacher_sum).all())


def test_draws_of_a_large_vocabulary_have_the_probabilities_of_the_teacher() -> None:
    """4,000 tokens with one distribution: p_hat of each id within 5 standard deviations."""
    size, rows = 70_001, 4_000
    logits = logits_of(1, size, 3, 2.0)
    heavy = torch.tensor([1, 65_535, 65_536, 70_000])
    logits[0, heavy] += 14
    logits[0, 70_000 - 1] = -math.inf
    codec = SampledCodec(16, size, (1.0, 2.0))
    cuts = [codec.encode(logits.expand(100, -1), keys_of(100, seed)) for seed in range(rows // 100)]
    records = torch.cat(cuts)
    for temperature in (1.0, 2.0):
        ids, parts, _ = codec.decode(records, temperature)
        p = torch.softmax(logits[0] / temperature, -1)
        assert not bool((ids == 70_000 - 1).any())
        for probability, chosen in [
            *((p[v], ids == v) for v in heavy),
            (p[:35_000].sum(), ids < 35_000),
        ]:
            means = (parts * chosen).sum(-1).double()
            deviation = float(means.std()) / math.sqrt(rows)
            assert abs(float(means.mean() - probability)) < 5 * deviation + 1e-4 * probability


def test_the_error_is_smaller_than_that_of_independent_draws() -> None:
    logits = logits_of(1, 200, 4, 2.0).expand(500, -1)
    p, codec = torch.softmax(logits[0], -1), SampledCodec(16, 200, (1.0,))
    error = codec.error_sums(logits, codec.encode(logits, keys_of(500)))[0, 0] / 500
    assert 0.1 < float(error) / float((1 - p.square().sum()) / 16) < 0.8


def test_a_draw_depends_on_seed_sample_and_token_alone() -> None:
    names, counts = [b"a", b"b", b"c"], [3, 0, 4]
    keys = token_keys(7, names, counts)
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == 7
    assert keys[3:].tolist() == token_keys(7, [b"c"], [9])[:4].tolist()
    assert not set(keys.tolist()) & set(token_keys(8, names, counts).tolist())
    # The same bits on every machine.
    assert token_keys(7, [b"a"], [2]).tolist() == [128347130976105829, 11603835452795225363]
    logits, codec = logits_of(7, 60, 5, 2.0), SampledCodec(6, 60, TEMPERATURES)
    records = codec.encode(logits, keys)
    order = torch.tensor([5, 0, 6, 2])
    assert torch.equal(records[order], codec.encode(logits[order], keys[order.numpy()]))
    assert not torch.equal(records, codec.encode(logits, token_keys(8, names, counts)))


def test_points_are_uniform_within_their_parts() -> None:
    points = stratified_points(keys_of(4_000), 5)
    within = points * 5 - np.arange(5)
    assert points.shape == (4_000, 5) and bool(((within > 0) & (within < 1)).all())
    # Means and correlations of uniform, independent numbers, within 5 standard deviations.
    assert np.abs(within.mean(0) - 0.5).max() < 5 * math.sqrt(1 / 12 / 4_000)
    assert np.abs(np.corrcoef(within.T) - np.eye(5)).max() < 5 / math.sqrt(4_000)
    assert stratified_points(keys_of(0), 5).shape == (0, 5)


@pytest.mark.parametrize("temperature", [1.0, 5 / 3])
@pytest.mark.parametrize("sft_ratio", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(3, 2), (100, 100)])
def test_the_gradient_equals_that_of_the_complete_logits(
    temperature: float, sft_ratio: float, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
    source = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    head = OutputHead(nn.Parameter(draw(40, 8)), nn.Parameter(draw(40)), 0.5, 7.0)
    hidden, masked = draw(11, 8).requires_grad_(), torch.zeros(38, dtype=torch.bool)
    masked[[3, 37]] = True
    ids, codec = VocabMap(38, masked), SampledCodec(6, 38, TEMPERATURES)
    labels = torch.randint(4, 37, (11,), generator=source)
    records = codec.encode(ids.mask(3 * draw(11, 38)), keys_of(11))
    terms = LossTerms("fkl", temperature=temperature, sft_ratio=sft_ratio)

    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)[:, :38] * head.scale
    logits = ids.mask(7.0 * torch.tanh(logits / 7.0))
    drawn, parts, teacher_sum = codec.decode(records, temperature)
    log_q = torch.log_softmax(logits / temperature, -1).gather(-1, drawn)
    kd = temperature**2 * (teacher_sum.sum() - (parts * log_q).sum())
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    total = sft_ratio * ce + (1 - sft_ratio) * kd
    leaves = [hidden, head.weight, head.bias]
    actual = loss_sums(
        hidden, head, labels, terms, vocab=ids, teacher_hidden=records, teacher_head=codec
    )
    for value, reference in zip(
        (*actual, *torch.autograd.grad(actual[0], leaves)),
        (total, kd, ce, *torch.autograd.grad(total, leaves)),
        strict=True,
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_value_is_0_where_the_student_equals_the_teacher(temperature: float) -> None:
    logits, codec = logits_of(20, 50, 6, 2.0, masked=4), SampledCodec(8, 50, TEMPERATURES)
    records = codec.encode(logits, keys_of(20))
    value, gradient = value_and_gradient(codec, records, logits, temperature)
    assert abs(float(value)) < 2e-3  # 20 tokens, rounded logits
    assert torch.allclose(gradient.sum(-1), torch.zeros(20, dtype=torch.float64), atol=1e-6)
    assert bool((gradient[logits == -math.inf] == 0).all())
    index = TEMPERATURES.index(temperature)
    squared, unique = codec.error_sums(logits, records)[index].tolist()
    assert squared == pytest.approx(float(gradient.square().sum()), rel=1e-3)
    assert unique == sum(len(set(row)) for row in codec.decode(records, temperature)[0].tolist())
    values, sentence = codec.describe_error([squared / 20, unique / 20])
    assert values == {"gradient_error": math.sqrt(squared / 20), "unique_ids": unique / 20}
    assert f"{unique / 20:.1f} different ids per token" in sentence


def test_a_record_is_small() -> None:
    """Bytes at 151,936 ids, where logits in bfloat16 have 303,872."""
    assert SampledCodec(50, 151_936, (1.0,)).bytes == 120
    assert SampledCodec(50, 151_936, TEMPERATURES).bytes == 236
    assert SampledCodec(50, 50_257, (1.0,)).bytes == 104


def test_unsupported_sizes_temperatures_and_divergences_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"mode=cached_sampled supports at most .* ids"):
        SampledCodec(50, MAX_IDS + 1, TEMPERATURES).validate(MAX_IDS)
    SampledCodec(50, 20, TEMPERATURES).validate(4)  # draws may repeat
    codec, logits = SampledCodec(2, 10, (1.0,)), torch.randn(3, 10)
    records = codec.encode(logits, keys_of(3))
    with pytest.raises(RecipeError, match=r"2 sampled ids\) hold temperature 1, not 1\.5"):
        codec.decode(records, 1.5)
    arguments: Any = (1.0, lambda: torch.empty(3, 10), True)
    for name in DIVERGENCES.keys() - {"fkl"}:
        with pytest.raises(RecipeError, match=f"would bias loss.name={name}"):
            codec.divergence(records, torch.full((3, 10), MASKED), name, {}, *arguments)
