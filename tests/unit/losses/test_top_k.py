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
from pocl_ds.losses.divergences import DIVERGENCES, MASKED, divergence_options
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
        assert torch.allclose(logits.gather(-1, ids).sort(-1, descending=True).values, largest)
        assert bool((ids.diff() > 0).all())
        span = largest[:, :1] - largest[:, -1:]
        # Half a quantization step in either direction, and rounding in float32.
        step = span / 65_535 / temperature + 1e-5 + 1e-6 * largest.abs().max()
        assert bool(((log_p[:, :-1] - exact.gather(-1, ids)).abs() <= step).all())
        other_mass = exact.scatter(-1, ids, -math.inf).exp().sum(-1)
        assert torch.allclose(log_p[:, -1].double().exp(), other_mass, atol=2e-4)
        assert torch.allclose(log_p.exp().sum(-1), torch.ones(tokens))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 4),
    size=st.sampled_from([12, 64, 70_000]),
    k=st.integers(1, 9),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    top_p=st.sampled_from([None, 0.5, 0.99]),
)
def test_log_probabilities_give_the_records_of_their_logits(
    tokens: int, size: int, k: int, seed: int, spread: float, top_p: float | None
) -> None:
    logits, codec = logits_of(tokens, size, seed, spread), TopKCodec(k, size, (1.0,), top_p)
    logs, ids = torch.log_softmax(logits, -1).topk(k)
    records = codec.encode_top(ids, logs, torch.ones(size, dtype=torch.bool))
    served_ids, served = codec.decode(records, 1.0)
    own_ids, own = codec.decode(codec.encode(logits), 1.0)
    assert torch.equal(served_ids, own_ids)
    assert torch.allclose(served[:, :k], own[:, :k], atol=1e-4 + 2e-4 * spread)
    assert torch.allclose(served[:, k].exp(), own[:, k].exp(), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), masked=st.integers(1, 9), spread=st.sampled_from([0.1, 3.0]))
def test_ids_that_take_no_part_lose_their_probability(
    seed: int, masked: int, spread: float
) -> None:
    """The others are normalized without them; a short list gets further ids with even shares."""
    k, size = 6, 40
    logits = logits_of(5, size, seed, spread)
    allowed = torch.ones(size, dtype=torch.bool)
    allowed[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:masked]] = False
    logs, ids = torch.log_softmax(logits, -1).topk(k)
    codec = TopKCodec(k, size, (1.0,))
    stored, log_p = codec.decode(
        codec.encode_top(torch.where(allowed[ids], ids, -1), logs, allowed), 1.0
    )
    assert allowed[stored].all() and (stored.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(5), atol=1e-4)
    for row in range(5):
        # Only the mass of the masked ids among the k is known to the student.
        removed = logs[row][~allowed[ids[row]]].exp().sum()
        known = {int(i): float(v.exp() / (1 - removed)) for i, v in zip(ids[row], logs[row])}
        others = 1 - sum(value for i, value in known.items() if allowed[i])
        share = others / (int(allowed.sum()) - sum(bool(allowed[i]) for i in known))
        share = min(share, *known.values())  # no other id has more
        for i, value in zip(stored[row].tolist(), log_p[row].exp().tolist()):
            assert value == pytest.approx(known.get(i, share), rel=2e-3, abs=1e-6)


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


@settings(max_examples=40, deadline=None)
@given(
    top_p=st.sampled_from([1e-6, 0.3, 0.8, 0.99, 1.0]),
    k=st.integers(1, 9),
    size=st.sampled_from([12, 65_537]),
    temperatures=st.sampled_from([(1.0,), TEMPERATURES]),
    seed=st.integers(0, 99),
)
def test_fewer_ids_are_stored_where_they_have_the_probability(
    top_p: float, k: int, size: int, temperatures: tuple[float, ...], seed: int
) -> None:
    logits, codec = logits_of(5, size, seed, 3.0), TopKCodec(k, size, temperatures, top_p)
    records = codec.encode(logits)
    # The shortest run of the most probable ids that reaches top_p at every temperature.
    order = logits.sort(-1, descending=True).indices
    reached = [
        torch.softmax(logits / tau, -1).gather(-1, order).cumsum(-1) >= top_p + 1e-6
        for tau in temperatures
    ]
    counts = torch.stack(reached).all(0).double().argmax(-1) + 1
    counts[~torch.stack(reached).all(0).any(-1)] = k
    for temperature in temperatures:
        ids, log_p = codec.decode(records, temperature)
        for row, count in enumerate(counts.clamp(max=k).tolist()):
            used = log_p[row, :-1] > MASKED
            assert abs(int(used.sum()) - count) <= (top_p == 1.0) * k
            stored = ids[row][used]
            assert set(stored.tolist()) == set(order[row, : len(stored)].tolist())
            exact = torch.softmax(logits[row] / temperature, -1)
            assert torch.allclose(log_p[row, :-1][used].exp().double(), exact[stored], atol=1e-3)
            rest = 1 - float(exact[stored].sum())
            assert float(log_p[row, -1].exp()) == pytest.approx(rest, abs=1e-3)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_unused_slots_have_no_part_in_value_and_gradient(name: str) -> None:
    """Against a codec whose k is the number of ids that each token stores."""
    teacher, student = (logits_of(6, 40, seed, 2.0).float() for seed in (1, 2))
    codec, options = TopKCodec(20, 40, (1.0,), 0.7), divergence_options(name, {})
    records = codec.encode(teacher)
    counts = (codec.decode(records, 1.0)[1][:, :-1] > MASKED).sum(-1).tolist()
    assert len(set(counts)) > 2 and max(counts) < 20

    def divergence(own: TopKCodec, own_records: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(rows, -1)
        value, gradient = own.divergence(
            own_records, log_q, name, options, 1.0, lambda: torch.empty_like(rows), True
        )
        assert gradient is not None
        return value, gradient

    value, gradient = divergence(codec, records, student)
    error = codec.error_sums(teacher, records)
    expected_error = torch.zeros_like(error)
    for row, count in enumerate(counts):
        own, one = TopKCodec(count, 40, (1.0,)), slice(row, row + 1)
        own_records = own.encode(teacher[one])
        own_value, own_gradient = divergence(own, own_records, student[one])
        torch.testing.assert_close(value[one], own_value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[one], own_gradient, rtol=1e-5, atol=1e-6)
        expected_error += own.error_sums(teacher[one], own_records)
    torch.testing.assert_close(error, expected_error, rtol=1e-4, atol=1e-5)
