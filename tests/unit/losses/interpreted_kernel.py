"""The loss kernel in Triton's interpreter against float64.

Triton reads TRITON_INTERPRET when a kernel is imported, so these tests need their own process:
`test_triton_loss.py` runs them, and `TRITON_INTERPRET=1 pytest` with this file does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocl_ds.config.registry import LOSSES
from pocl_ds.losses import divergence, fused_inputs
from pocl_ds.losses.closed_forms import CLOSED_FORMS
from pocl_ds.losses.divergences import divergence_options
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_losses import Buffers, EagerLoss, LossTerms
from pocl_ds.losses.token_rules import TokenFactors, TokenRule
from pocl_ds.losses.token_signals import LogProbSignals
from pocl_ds.losses.triton_loss import TritonLoss, padded_size
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap

BLOCK = 32
# Every branch of the kernel: its name and options.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    *((name, {}) for name in CLOSED_FORMS),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
    ("skl", {"skew": 1.0}),
    ("srkl", {"skew": 0.0}),
    ("srkl", {"skew": 0.6, "detach_mixture": True}),
    *(
        ("ab", {"ab_alpha": a, "ab_beta": b})
        for a, b in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0), (0.4, -0.4), (-0.2, 0.7))
    ),
]


def logits_of(head: OutputHead, products: Tensor) -> Tensor:
    """Out of place, so that autograd passes through it."""
    scaled = products * head.scale
    return scaled if head.soft_cap is None else head.soft_cap * (scaled / head.soft_cap).tanh()


@dataclass(frozen=True)
class Case:
    """Logits of a chunk and the loss to compute from them."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    masked: Tensor | None
    terms: LossTerms
    heads: tuple[OutputHead, OutputHead]

    @property
    def size(self) -> int:
        return self.student.shape[1]

    def arguments(self) -> tuple[Any, ...]:
        student, teacher = self.heads
        options = divergence_options(self.terms.name, self.terms.options)
        vocab = VocabMap(self.size, self.masked)
        return self.terms, options, vocab, student, None if self.terms.name == "sft" else teacher

    def run(self, loss: Any, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sums, and what the loss leaves in the student's logits."""
        logits = self.student.clone() if logits is None else logits
        teacher = None if self.terms.name == "sft" else self.teacher.clone()
        return loss(logits, teacher, TokenInputs(self.labels)).double(), logits

    def in_triton(self, **settings: Any) -> tuple[Tensor, Tensor]:
        return self.run(TritonLoss(*self.arguments(), True, block=BLOCK, warps=1, **settings))

    def expected(self) -> tuple[Tensor, Tensor]:
        """Sums and gradient in float64, by autograd through the formulas of the method."""
        leaf, terms = self.student.double().requires_grad_(), self.terms
        z_q, z_p = (
            self._masked(logits_of(head, side))
            for head, side in zip(self.heads, (leaf, self.teacher.double()), strict=True)
        )
        ce = nn.functional.cross_entropy(z_q, self.labels, reduction="sum")
        settings = {
            "temperature": terms.temperature,
            "reduction": "sum",
            "scale_by_temperature_squared": terms.scale_by_temperature_squared,
        }
        kd = divergence(terms.name, z_q, z_p, **settings, **terms.options)
        (terms.ce_weight * ce + (1 - terms.ce_weight) * kd).backward()
        assert leaf.grad is not None
        return torch.stack([kd, ce]).detach(), leaf.grad

    def _masked(self, logits: Tensor) -> Tensor:
        return logits if self.masked is None else logits.masked_fill(self.masked, -torch.inf)


@st.composite
def cases(draw: st.DrawFn, name: str, options: dict[str, Any]) -> Case:
    """Any temperature, SFT ratio, head and mask; sizes beside multiples of the block. Hypothesis
    begins with the first of each list, which asks most of the kernel.
    """
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    size, rows = choose(3 * BLOCK + 1, 2 * BLOCK - 7, BLOCK, BLOCK - 1), choose(2, 1)
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sides, heads = [], []
    for offset in (0.0, 50.0):  # a softmax does not see it, unless a soft cap follows
        cap = choose(9.0, None, 30.0)
        products = torch.randn(rows, size, generator=source) * choose(2.0, 0.1, 3.0)
        # The largest logit grows from block to block.
        products += choose(4.0, 0.0) * torch.linspace(-1, 1, size) + (0.0 if cap else offset)
        sides.append(products.to(choose(torch.float32, torch.bfloat16, torch.float16)))
        heads.append(OutputHead(None, None, choose(0.7, 1.0, 1.5), cap, size))
    masked, labels = None, torch.randint(0, size, (rows,), generator=source)
    if choose(True, False):
        masked = torch.rand(size, generator=source) < 0.2
        masked[: choose(BLOCK, 0)] = True  # the first block may have no id
        masked[-1] = False
        labels[:] = size - 1
    terms = LossTerms(
        name, choose(1.7, 1.0, 0.6), choose(0.3, 0.0, 1.0), choose(False, True), options
    )
    return Case(sides[0], sides[1], labels, masked, terms, (heads[0], heads[1]))


def example(name: str, kind: torch.dtype, rows: int = 2, size: int = 2 * BLOCK + 5) -> Case:
    source = torch.Generator().manual_seed(4)
    sides = (torch.randn(rows, size, generator=source) * 3 for _ in range(2))
    student, teacher = (side.to(kind) for side in sides)
    masked, labels = torch.arange(size) % 7 == 3, torch.full((rows,), 5)
    head = OutputHead(None, None, 1.0, None, size)
    terms = LossTerms(name, 1.7, 0.0 if name == "sft" else 0.3)
    return Case(student, teacher, labels, masked, terms, (head, head))


@pytest.mark.parametrize(("name", "options"), FORMS)
@given(data=st.data())
@settings(max_examples=3, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
def test_sums_and_gradient_equal_float64(
    name: str, options: dict[str, Any], data: st.DataObject
) -> None:
    case = data.draw(cases(name, options))
    expected_sums, expected = case.expected()
    sums, gradient = case.in_triton()
    assert gradient.dtype == case.student.dtype
    assert torch.allclose(sums, expected_sums, rtol=1e-4, atol=1e-4)
    # The arithmetic is float32; a narrower type rounds its result.
    rounding = 0.0 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
    size = max(1.0, float(expected.abs().max()))
    assert torch.allclose(gradient.double(), expected, rtol=1e-4 + rounding, atol=2e-5 * size)
    if case.masked is not None:
        assert (gradient[:, case.masked] == 0).all()


@pytest.mark.parametrize("name", ["sft", *CLOSED_FORMS])
def test_the_error_in_bfloat16_is_no_larger_than_that_of_the_eager_form(name: str) -> None:
    """The interpreter cuts bits off where a GPU rounds, so the kernel's result is rounded here."""
    case = example(name, torch.bfloat16, rows=3)
    _, expected = case.expected()
    buffers = Buffers(3, case.size, torch.float32, torch.device("cpu"))
    _, eager = case.run(EagerLoss(*case.arguments(), buffers, True))
    _, exact = replace(case, student=case.student.float()).in_triton()
    gradient = exact.bfloat16()
    error = lambda actual: float((actual.double() - expected).norm())  # noqa: E731
    assert error(gradient) <= 1.01 * error(eager)


@pytest.mark.parametrize("name", ["rkl", "jsd"])
def test_a_token_has_the_same_bits_in_every_chunk(name: str) -> None:
    case = example(name, torch.float32, rows=3)
    _, together = case.in_triton()
    last = slice(2, 3)
    alone = replace(
        case, student=case.student[last], teacher=case.teacher[last], labels=case.labels[last]
    )
    assert torch.equal(alone.in_triton()[1], together[last])


@pytest.mark.parametrize("name", ["sft", "fkl", "tvd"])
def test_without_a_gradient_the_sums_are_the_same_and_logits_stay(name: str) -> None:
    case = example(name, torch.float32)
    sums, logits = case.run(TritonLoss(*case.arguments(), False, block=BLOCK))
    assert torch.equal(sums, case.in_triton()[0]) and torch.equal(logits, case.student)


def test_padded_rows_and_weights_of_tokens() -> None:
    """The columns between rows hold anything; the gradient is that of a weighted cross-entropy."""
    case, weights = example("sft", torch.float32), torch.tensor([0.3, -2.0])
    padded = torch.full((2, padded_size(case.size)), torch.nan)
    padded[:, : case.size] = case.student
    logits = padded[:, : case.size]
    loss = TritonLoss(*case.arguments(), True, block=BLOCK)
    loss(logits, None, TokenInputs(case.labels, span_weights=weights))
    leaf = case.student.double().requires_grad_()
    assert case.masked is not None
    log_q = leaf.masked_fill(case.masked, -torch.inf).log_softmax(-1)
    (weights.double() * -log_q[torch.arange(2), case.labels]).sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(logits.double(), leaf.grad, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), FORMS[1:])
def test_a_temperature_for_each_token_equals_one_token_at_a_time(
    name: str, options: dict[str, Any]
) -> None:
    """With weights of the rule and of samples beside it."""
    case = example(name, torch.float32, rows=3)
    case = replace(case, terms=replace(case.terms, options=options))
    factors, weights = torch.tensor([0.5, 1.0, 1.8]), torch.tensor([2.0, 1.0, 0.25])

    class Rule(TokenRule):
        def __call__(self, *_: Any) -> TokenFactors:
            return TokenFactors(factors, weights)

    terms = replace(case.terms, token_rule=Rule("adakd", {}))
    loss = TritonLoss(terms, *case.arguments()[1:], True, block=BLOCK)
    logits = case.student.clone()
    tokens = TokenInputs(case.labels, torch.tensor([1.0, 3.0, 0.5]), position=torch.zeros(3))
    sums = loss(logits, case.teacher.clone(), tokens).double()
    total = torch.zeros(4, dtype=torch.float64)
    for t in range(3):
        own = slice(t, t + 1)
        alone = replace(
            case,
            student=case.student[own],
            teacher=case.teacher[own],
            labels=case.labels[own],
            terms=replace(case.terms, temperature=1.7 * float(factors[t])),
        )
        (kd, ce), both = alone.expected()
        _, of_ce = replace(alone, terms=replace(alone.terms, sft_ratio=1.0)).expected()
        of_ce = alone.terms.sft_ratio * of_ce
        sample = float(tokens.weights[t])  # type: ignore[index]
        weight = float(weights[t])
        total += torch.stack([kd, ce, sample * weight * kd, sample * ce])
        expected = sample * (of_ce + weight * (both - of_ce))
        size = max(1.0, float(expected.abs().max()))
        assert torch.allclose(logits[own].double(), expected, rtol=1e-4, atol=2e-5 * size)
    assert torch.allclose(sums, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sft", *CLOSED_FORMS])
def test_weights_of_tokens_multiply_value_and_gradient(name: str) -> None:
    case = example(name, torch.float32, rows=3)
    weights = torch.tensor([0.0, 2.5, 1.0])
    loss = TritonLoss(*case.arguments(), True, block=BLOCK)
    teacher, logits = None if name == "sft" else case.teacher.clone(), case.student.clone()
    sums = loss(logits, teacher, TokenInputs(case.labels, weights))
    plain_sums, plain = case.in_triton()
    assert torch.equal(sums[:2].double(), plain_sums)
    assert torch.allclose(logits, weights[:, None] * plain, rtol=1e-5, atol=1e-7)
    assert (logits[0] == 0).all()
    parts = [
        replace(case, student=side, teacher=other, labels=label).in_triton()[0]
        for side, other, label in zip(
            *(side.split(1) for side in (case.student, case.teacher, case.labels)), strict=True
        )
    ]
    assert torch.allclose(sums[2:].double(), weights.double() @ torch.stack(parts), rtol=1e-5)


SIGNALS = (
    "teacher_entropy",
    "student_entropy",
    "hellinger",
    "teacher_label_prob",
    "student_label_prob",
    "agreement",
)


@given(data=st.data())
@settings(max_examples=25, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
def test_signals_equal_float64(data: st.DataObject) -> None:
    case = data.draw(cases("fkl", {}))
    loss, before = TritonLoss(*case.arguments(), True, block=BLOCK), case.student.clone()
    tokens = TokenInputs(case.labels, position=torch.zeros(len(case.labels)))
    actual = loss.signals(case.student, case.teacher, tokens)
    assert torch.equal(case.student, before)
    log_q, log_p = (
        case._masked(logits_of(head, side.double())).log_softmax(-1)
        for head, side in zip(case.heads, (case.student, case.teacher), strict=True)
    )
    log_p, log_q = (side.masked_fill(side == -torch.inf, -1e30) for side in (log_p, log_q))
    buffers = [torch.empty_like(log_p) for _ in range(2)]
    assert tokens.position is not None
    expected = LogProbSignals(
        lambda: log_p, log_q, case.labels, tokens.position, lambda number: buffers[number]
    )
    for name in SIGNALS:
        # 1 - sum(sqrt(p q)) has the rounding of float32, of which the distance is the root.
        tolerance = 2e-3 if name == "hellinger" else 2e-5
        value, reference = getattr(actual, name).double(), getattr(expected, name)
        assert torch.allclose(value, reference, rtol=1e-4, atol=tolerance), name
    assert torch.allclose(actual.hellinger.double() ** 2, expected.hellinger**2, atol=1e-5)


def test_ties_of_the_most_probable_id_take_the_lowest() -> None:
    case = example("fkl", torch.float32, rows=2)
    student, teacher = case.student.clone(), case.teacher.clone()
    student[:, [4, 60]] = 20.0  # in different blocks; id 3 is masked
    teacher[0, [4, 5]] = teacher[1, [60, 61]] = 20.0
    tokens = TokenInputs(case.labels, position=torch.zeros(2))
    actual = TritonLoss(*case.arguments(), True, block=BLOCK).signals(student, teacher, tokens)
    assert actual.agreement.tolist() == [1, 0]


@pytest.mark.parametrize("rule", [None, ("adakd", {"threshold": 0.45}), ("entropy_weight", {})])
@pytest.mark.parametrize(("name", "chunk_bytes"), [("srkl", 2000), ("rkl", 1 << 20)])
def test_the_fused_head_over_the_kernel_equals_its_eager_form(
    name: str,
    chunk_bytes: int,
    rule: tuple[str, dict[str, Any]] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bias, scale, soft cap, a masked id, other ids of the teacher and chunks of five tokens; with
    a token rule also weights of samples.
    """
    source = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=source)  # noqa: E731
    head = OutputHead(nn.Parameter(draw(40, 8)), nn.Parameter(draw(40)), 0.5, 7.0)
    teacher = OutputHead(nn.Parameter(draw(44, 12)), None, 1.0, None)
    vocab = VocabMap(38, torch.arange(38) == 37, torch.randperm(44, generator=source)[:38])
    hidden, teacher_hidden = draw(7, 8).requires_grad_(), draw(7, 12)
    labels = torch.randint(0, 37, (7,), generator=source)
    results = []
    for obstacle in ("the test compares", None):
        monkeypatch.setattr(fused_inputs, "kernel_obstacle", lambda *_, text=obstacle: text)
        sums = loss_sums(
            hidden,
            head,
            labels,
            LossTerms(
                name,
                1.6,
                0.3,
                options=LOSSES[name],
                token_rule=TokenRule.of(*rule) if rule else None,
            ),
            vocab=vocab,
            sample_of_token=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
            sample_weights=torch.tensor([0.5, 2.0, 0.0]) if rule else None,
            teacher_hidden=teacher_hidden,
            teacher_head=teacher,
            chunk_bytes=chunk_bytes if obstacle is None else 1 << 20,
        )
        leaves = [leaf for leaf in (hidden, head.weight, head.bias) if leaf is not None]
        results.append([*sums, *torch.autograd.grad(3 * sums[0], leaves)])
    for eager, actual in zip(*results, strict=True):
        assert torch.allclose(actual, eager.detach(), rtol=1e-4, atol=2e-5)
