"""Temperature and weight of each token: the fused loss against complete logits in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from complete_logits import SAMPLE_OF_TOKEN, SAMPLES, TOKENS, Case, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocl_ds import plugins
from pocl_ds.config import registry
from pocl_ds.errors import NumericalError, RecipeError
from pocl_ds.losses import (
    FusedLinearDistillationLoss,
    divergence,
    fused_inputs,
    fused_linear_distillation_loss,
)
from pocl_ds.losses.divergences import DIVERGENCES
from pocl_ds.losses.fused_inputs import ChunkSizes
from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TOKEN_RULES, TokenFactors, TokenRule, adakd
from pocl_ds.losses.token_signals import SignalValues
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.models.heads import HeadMixture

POSITION = torch.tensor([0, 0.5, 1, 0, 1, 0, 1 / 3, 2 / 3, 1, 0, 1], dtype=torch.float64)
RULES: list[tuple[str, dict[str, Any]]] = [
    ("adakd", {}),
    ("adakd", {"strength": -0.8, "center": 0.3, "threshold": 0.6}),
    ("adakd", {"strength": 0.0, "threshold": 0.6}),
    ("entropy_weight", {"strength": 1.5, "center": 0.7}),
    ("position_decay", {"end_weight": 0.2}),
]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What a test registers is removed afterwards."""
    tables: tuple[dict[str, Any], ...] = (registry.TOKEN_RULES, TOKEN_RULES)
    originals = [copy.copy(table) for table in tables]
    yield
    for table, original in zip(tables, originals, strict=True):
        table.clear()
        table.update(original)


def signals_of(case: Case) -> dict[str, Tensor]:
    """The signals by their definitions, from complete logits."""
    q, p = (side.detach().softmax(-1) for side in case.logits())
    token = torch.arange(TOKENS)
    return {
        "teacher_entropy": -torch.xlogy(p, p).sum(-1),
        "student_entropy": -torch.xlogy(q, q).sum(-1),
        "hellinger": (1 - (p * q).sqrt().sum(-1)).sqrt(),
        "teacher_label_prob": p[token, case.labels],
        "student_label_prob": q[token, case.labels],
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "position": POSITION,
    }


def expected_factors(
    name: str, options: dict[str, Any], signals: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Temperature factor and weight by the formulas of the method, one token at a time."""
    options = {**registry.TOKEN_RULES[name], **options}
    temperatures, weights = torch.ones(2, TOKENS, dtype=torch.float64)
    for t in range(TOKENS):
        read = {key: float(value[t]) for key, value in signals.items()}
        if name == "adakd":
            relative = math.tanh(math.log(read["hellinger"] / options["center"]))
            temperatures[t] = math.exp(-options["strength"] * relative)
            weights[t] = float(read["hellinger"] >= options["threshold"])
        elif name == "entropy_weight":
            relative = math.tanh(math.log(read["teacher_entropy"] / options["center"]))
            weights[t] = math.exp(options["strength"] * relative)
        else:
            weights[t] = 1 + (options["end_weight"] - 1) * read["position"]
    return temperatures, weights


def by_token(case: Case, terms: LossTerms, factors: Tensor, options: dict[str, Any]) -> Tensor:
    """The divergence of each token at its own temperature, by autograd."""
    z_q, z_p = case.logits()
    values = [
        divergence(
            terms.name,
            z_q[t],
            z_p[t],
            temperature=terms.temperature * float(factors[t]),
            scale_by_temperature_squared=terms.scale_by_temperature_squared,
            **options,
        )
        for t in range(TOKENS)
    ]
    return torch.stack(values)


def assert_equals_complete_logits(
    case: Case, terms: LossTerms, rule: tuple[Tensor, Tensor], sample_weights: Tensor | None
) -> None:
    """rule: the expected temperature factors and weights."""
    kd = by_token(case, terms, rule[0], terms.options)
    ce = torch.nn.functional.cross_entropy(case.logits()[0], case.labels, reduction="none")
    alpha, samples = terms.ce_weight, torch.ones(TOKENS, dtype=torch.float64)
    if sample_weights is not None:
        samples = sample_weights.double()[SAMPLE_OF_TOKEN]
    total = (samples * (alpha * ce + (1 - alpha) * rule[1] * kd)).sum()
    actual = case.sums(terms, sample_weights)
    assert_close(actual, (total, kd.sum(), ce.sum()))
    assert_close(case.gradients(3 * actual[0]), case.gradients(3 * total))


@pytest.mark.parametrize("name", list(DIVERGENCES))
@given(
    rule=st.sampled_from(RULES),
    sizes=st.sampled_from([(1, 1), (5, 2), (100, 100)]),
    temperature=st.sampled_from([1.0, 1.6]),
    sft_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    squared=st.booleans(),
    weighted=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=10, deadline=None, database=None, derandomize=True)
def test_equals_complete_logits(
    name: str,
    rule: tuple[str, dict[str, Any]],
    sizes: tuple[int, int],
    temperature: float,
    sft_ratio: float,
    squared: bool,
    weighted: bool,
    tied: bool,
    seed: int,
) -> None:
    case = Case(seed, tied=tied)
    terms = LossTerms(name, temperature, sft_ratio, squared, {}, TokenRule.of(*rule))
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0]) if weighted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
        factors = expected_factors(*rule, signals_of(case))
        assert_equals_complete_logits(case, terms, factors, weights)


def test_a_plugin_reads_every_signal_and_is_a_constant_for_the_gradient() -> None:
    seen: dict[str, Tensor] = {}

    @plugins.token_rule("everything", gain=1.0)
    def everything(signals: Any, *, gain: float) -> TokenFactors:
        for name in signals_of(case):
            seen[name] = getattr(signals, name).clone()
        mixed = signals.student_label_prob + signals.agreement + signals.hellinger
        return TokenFactors(0.5 + gain * signals.teacher_label_prob, mixed)

    case = Case(4)
    rule = TokenRule.of("everything", {"gain": 0.7})
    terms = LossTerms("skl", 1.3, 0.2, options={"skew": 0.3}, token_rule=rule)
    expected = signals_of(case)
    mixed = expected["student_label_prob"] + expected["agreement"] + expected["hellinger"]
    factors = (0.5 + 0.7 * expected["teacher_label_prob"], mixed)
    assert_equals_complete_logits(case, terms, factors, None)
    assert_close(seen.values(), expected.values())
    with pytest.raises(RecipeError, match="there is a token rule 'adakd' already"):
        plugins.token_rule("adakd")(everything)


@pytest.mark.parametrize("name", ["fkl", "akl"])
def test_an_ensemble_mixes_at_the_temperature_of_each_token(name: str) -> None:
    """Two equal teachers are one."""
    case = Case(2)
    terms = LossTerms(name, 1.6, 0.3, token_rule=TokenRule.of("adakd", {"threshold": 0.5}))
    twice = torch.cat([case.teacher_hidden] * 2, -1)
    head = HeadMixture((case.teacher, case.teacher), (0.75, 0.25))
    actual = case.sums(terms, None, teacher_hidden=twice, teacher_head=head)
    expected = case.sums(terms, None)
    assert_close(actual, expected)
    assert_close(case.gradients(actual[0]), case.gradients(expected[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_near_float64(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(8)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    tensors = [draw(2, 9, 6), draw(30, 6), draw(2, 9, 5), draw(30, 5)]
    labels = torch.randint(0, 30, (2, 9), generator=source)
    rule: dict[str, Any] = {"token_rule": "adakd", "token_rule_options": {"strength": 0.7}}
    rounded = [tensor.to(dtype) for tensor in tensors]
    actual = fused_linear_distillation_loss(*rounded, labels, temperature=1.5, **rule)
    exact = [tensor.double() for tensor in rounded]
    expected = fused_linear_distillation_loss(*exact, labels, temperature=1.5, **rule)
    plain = fused_linear_distillation_loss(*exact, labels, temperature=1.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(actual.double(), expected, rtol=tolerance)
    assert not torch.allclose(plain, expected, rtol=tolerance)
    module = FusedLinearDistillationLoss(temperature=1.5, **rule)
    assert torch.equal(module(*rounded, labels), actual)


def test_without_effect_the_loss_is_that_without_a_rule() -> None:
    case = Case()
    for name, options in (("adakd", {"strength": 0}), ("entropy_weight", {"strength": 0})):
        terms = LossTerms("rkl", 1.6, 0.3, token_rule=TokenRule.of(name, options))
        assert_close(case.sums(terms, None), case.sums(replace(terms, token_rule=None), None))


def values(**signals: list[float]) -> Any:
    size = len(next(iter(signals.values())))
    names = SignalValues.__dataclass_fields__
    return SignalValues(
        **{name: torch.tensor(signals.get(name, [math.nan] * size)) for name in names}
    )


def test_the_rules_on_numbers_by_hand() -> None:
    """At the center the factor is 1; at 3 centers tanh(log 3) = (9 - 1) / (9 + 1) = 0.8."""
    factors = adakd(values(hellinger=[0.0, 0.3, 0.9]), strength=0.5, center=0.3, threshold=0.3)
    expected = torch.tensor([math.exp(0.5), 1.0, math.exp(-0.4)])
    assert factors.temperature is not None and factors.weight is not None
    assert torch.allclose(factors.temperature, expected)
    assert factors.weight.tolist() == [0, 1, 1]
    entropy = TOKEN_RULES["entropy_weight"](
        values(teacher_entropy=[0.0, 2.0, 6.0]), strength=0.5, center=2.0
    )
    expected = torch.tensor([math.exp(-0.5), 1.0, math.exp(0.4)])
    assert entropy.temperature is None and entropy.weight is not None
    assert torch.allclose(entropy.weight, expected)
    decay = TOKEN_RULES["position_decay"](values(position=[0.0, 0.25, 1.0]), end_weight=0.2)
    assert decay.weight is not None and torch.allclose(decay.weight, torch.tensor([1, 0.8, 0.2]))


@given(
    name=st.sampled_from(["adakd", "entropy_weight", "position_decay"]),
    size=st.floats(0, 1),
    entropy=st.floats(0, 20),
    strength=st.floats(-5, 5),
    center=st.floats(0.001, 1),
    fraction=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_the_factors_of_built_in_rules_are_valid(
    name: str, size: float, entropy: float, strength: float, center: float, fraction: float
) -> None:
    options = {
        "strength": strength,
        "center": center,
        "threshold": fraction,
        "end_weight": fraction,
    }
    own = {key: value for key, value in options.items() if key in registry.TOKEN_RULES[name]}
    rule = TokenRule.of(name, own)
    signals = values(hellinger=[size], teacher_entropy=[entropy], position=[size])
    factors = rule(signals, torch.zeros(1, dtype=torch.int64), torch.float32)
    if factors.temperature is not None:
        assert math.exp(-5.1) < float(factors.temperature) < math.exp(5.1)
    if factors.weight is not None:
        assert 0 <= float(factors.weight) < math.exp(5.1)


def constant(temperature: Any, weight: Any) -> Callable[..., TokenFactors]:
    fill = lambda like, value: None if value is None else torch.full_like(like, value)  # noqa: E731
    return lambda signals: TokenFactors(
        fill(signals.position, temperature), fill(signals.position, weight)
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (constant(0.0, None), "a temperature factor that is not positive and finite to 11 tokens"),
        (constant(-1.0, None), "gave a temperature factor"),
        (constant(math.inf, None), "gave a temperature factor"),
        (constant(math.nan, 1.0), "gave a temperature factor"),
        (constant(None, -0.1), "gave a weight that is negative or not finite to 11 tokens"),
        (constant(1.0, math.nan), "gave a weight"),
        (constant(1.0, math.inf), "gave a weight"),
    ],
)
def test_invalid_factors_of_a_plugin_name_the_rule(
    rule: Callable[..., TokenFactors], message: str
) -> None:
    plugins.token_rule("mine")(rule)
    terms = LossTerms("fkl", token_rule=TokenRule.of("mine", {}))
    with pytest.raises(NumericalError, match=rf"the token rule mine .*{message}"):
        Case().sums(terms, None, chunk_bytes=10_000)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned a NoneType: return TokenFactors"),
        (TokenFactors(torch.ones(3)), r"returned a temperature of \(3,\) for 11 tokens"),
        (TokenFactors(weight=torch.ones(11, 1)), r"returned a weight of \(11, 1\) for 11 tokens"),
        (TokenFactors(weight=2.0), "returned a weight of float for 11 tokens"),  # type: ignore[arg-type]
    ],
)
def test_anything_but_a_number_per_token_is_refused(result: Any, message: str) -> None:
    plugins.token_rule("mine")(lambda signals: result)
    terms = LossTerms("fkl", token_rule=TokenRule.of("mine", {}))
    with pytest.raises(RecipeError, match=f"the token rule mine {message}"):
        Case().sums(terms, None)


def test_a_loss_without_the_teachers_logits_is_refused() -> None:
    case, rule = Case(), TokenRule.of("adakd", {})
    with pytest.raises(RecipeError, match="the token rule adakd needs the logits of teachers"):
        case.sums(LossTerms("sft", token_rule=rule), None, teacher_hidden=None, teacher_head=None)
    codec = TopKCodec(6, 38, (1.0,))
    records = codec.encode(case.logits()[1].float())
    with pytest.raises(RecipeError, match="the token rule adakd needs the logits of teachers"):
        case.sums(
            LossTerms("fkl", token_rule=rule), None, teacher_hidden=records, teacher_head=codec
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adaptive", {}, "there is no token rule 'adaptive': choose one of adakd"),
        ("adakd", {"centre": 1}, "adakd has no option 'centre': it has strength, center, thresh"),
        ("adakd", {"center": 0}, "adakd: center=0 must be between 0.001 and 1"),
        ("entropy_weight", {"strength": math.inf}, "strength=inf must be a finite number"),
        ("position_decay", {"end_weight": -1}, "end_weight=-1 must be between 0 and 1"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TokenRule.of(name, options)


def test_the_position_in_a_sample() -> None:
    tokens = TokenInputs.of_samples(
        SAMPLE_OF_TOKEN, SAMPLE_OF_TOKEN, None, torch.float64, with_position=True
    )
    assert tokens.position is not None and torch.equal(tokens.position, POSITION)
    single = torch.tensor([0, 2, 3])
    tokens = TokenInputs.of_samples(single, single, None, torch.float32, with_position=True)
    assert tokens.position is not None and tokens.position.tolist() == [0, 0, 0]
    empty = single[:0]
    tokens = TokenInputs.of_samples(empty, empty, None, torch.float32, with_position=True)
    assert len(tokens) == 0 and tokens.position is not None and len(tokens.position) == 0
    assert SAMPLES == 4


def test_the_registry_has_the_rules() -> None:
    assert list(TOKEN_RULES) == list(registry.TOKEN_RULES)
