"""The fused head against the plain form: all logits at once, autograd through everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocl_ds.data.batches import Batch
from pocl_ds.errors import RecipeError
from pocl_ds.losses import divergence, fused_inputs, token_losses
from pocl_ds.losses.divergences import DIVERGENCES
from pocl_ds.losses.fused_head import LossHead, loss_sums
from pocl_ds.losses.fused_inputs import ChunkSizes, chunk_sizes
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import HeadMixture, OutputHead
from pocl_ds.models.vocab import VocabMap


def heads(
    kind: torch.dtype, *, bias: bool, scale: float, cap: float | None
) -> tuple[OutputHead, OutputHead, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)  # noqa: E731
    student = OutputHead(
        nn.Parameter(draw(40, 8)), nn.Parameter(draw(40)) if bias else None, scale, cap
    )
    teacher = OutputHead(nn.Parameter(draw(44, 12)), None, 1.0, None)
    return (
        student,
        teacher,
        draw(23, 8),
        draw(23, 12),
        torch.randint(0, 37, (23,), generator=generator),
    )


def plain(
    hidden: Tensor,
    student: OutputHead,
    labels: Tensor,
    terms: LossTerms,
    ids: VocabMap,
    teacher_hidden: Tensor,
    teacher: OutputHead,
) -> Any:
    z_q = (
        torch.nn.functional.linear(hidden, student.weight, student.bias)[:, : ids.size]
        * student.scale
    )
    z_q = z_q if student.soft_cap is None else student.soft_cap * torch.tanh(z_q / student.soft_cap)
    z_p = teacher_hidden @ teacher.weight.T
    z_p = z_p[:, : ids.size] if ids.teacher_ids is None else z_p[:, ids.teacher_ids]
    if ids.masked is not None:
        z_q, z_p = z_q.masked_fill(ids.masked, -torch.inf), z_p.masked_fill(ids.masked, -torch.inf)
    ce = torch.nn.functional.cross_entropy(z_q, labels, reduction="sum")
    kd = divergence(
        terms.name,
        z_q,
        z_p,
        reduction="sum",
        temperature=terms.temperature,
        scale_by_temperature_squared=terms.scale_by_temperature_squared,
        **terms.options,
    )
    sft_ratio = 1.0 if terms.name == "sft" else terms.sft_ratio
    return sft_ratio * ce + (1 - sft_ratio) * kd, kd, ce


@pytest.mark.parametrize("name", [*DIVERGENCES, "sft"])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 0.5, 7.0)])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 2), (23, 4), (100, 100)])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("sft_ratio", [0.0, 0.3, 1.0])
def test_equals_the_plain_form(
    name: str,
    bias: bool,
    scale: float,
    cap: float | None,
    sizes: tuple[int, int],
    temperature: float,
    sft_ratio: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masked ids, other ids of the teacher, biases, scales and caps, in chunks and blocks of any
    size.
    """
    monkeypatch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float64, bias=bias, scale=scale, cap=cap
    )
    masked = torch.zeros(38, dtype=torch.bool)
    masked[37] = True
    mapped = torch.randperm(44, generator=torch.Generator().manual_seed(5))[:38] if bias else None
    ids, terms = (
        VocabMap(38, masked, mapped),
        LossTerms(name, temperature=temperature, sft_ratio=sft_ratio),
    )
    leaves = [
        hidden.requires_grad_(),
        *(p for p in (student.weight, student.bias) if p is not None),
    ]
    expected = plain(hidden, student, labels, terms, ids, teacher_hidden, teacher)
    expected_gradients = torch.autograd.grad(3 * expected[0], leaves)
    actual = loss_sums(
        hidden,
        student,
        labels,
        terms,
        vocab=ids,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher,
    )
    gradients = torch.autograd.grad(3 * actual[0], leaves)
    for value, reference in zip(
        (*actual, *gradients), (*expected, *expected_gradients), strict=True
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_the_squared_temperature_can_be_turned_off(name: str) -> None:
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float64, bias=True, scale=1.0, cap=None
    )
    ids, terms = (
        VocabMap(38),
        LossTerms(name, temperature=0.7, sft_ratio=0.3, scale_by_temperature_squared=False),
    )
    leaves = [hidden.requires_grad_(), student.weight]
    expected = plain(hidden, student, labels, terms, ids, teacher_hidden, teacher)
    actual = loss_sums(
        hidden,
        student,
        labels,
        terms,
        vocab=ids,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher,
    )
    expected_gradients, gradients = (
        torch.autograd.grad(total[0], leaves) for total in (expected, actual)
    )
    for value, reference in zip(
        (*actual, *gradients), (*expected, *expected_gradients), strict=True
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("sizes", [(5, 2), (100, 100)])
def test_an_ensemble_equals_one_teacher_with_the_mean_of_their_probabilities(
    name: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float64, bias=True, scale=0.5, cap=7.0
    )
    source = torch.Generator().manual_seed(9)
    weight, other_hidden = (
        torch.randn(rows, 3, generator=source, dtype=torch.float64) for rows in (41, 23)
    )
    other = OutputHead(nn.Parameter(weight), None, 2.0, 5.0)
    ids, terms = (
        VocabMap(38, torch.arange(38) == 37),
        LossTerms(name, temperature=1.6, sft_ratio=0.3),
    )
    probabilities = [
        ids.teacher_logits(member, states).div(1.6).softmax(-1)
        for member, states in ((teacher, teacher_hidden), (other, other_hidden))
    ]
    identity = OutputHead(nn.Parameter(torch.eye(38, dtype=torch.float64)), None, 1.0, None)
    mean = (0.75 * probabilities[0] + 0.25 * probabilities[1]).clamp(min=1e-300).log() * 1.6
    leaves = [p for p in (hidden.requires_grad_(), student.weight, student.bias) if p is not None]
    expected = loss_sums(
        hidden, student, labels, terms, vocab=ids, teacher_hidden=mean, teacher_head=identity
    )
    mixture, states = (
        HeadMixture((teacher, other), (0.75, 0.25)),
        torch.cat([teacher_hidden, other_hidden], -1),
    )
    actual = loss_sums(
        hidden, student, labels, terms, vocab=ids, teacher_hidden=states, teacher_head=mixture
    )
    expected_gradients, gradients = (
        torch.autograd.grad(total[0], leaves) for total in (expected, actual)
    )
    for value, reference in zip(
        (*actual, *gradients), (*expected, *expected_gradients), strict=True
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [*DIVERGENCES, "sft"])
@pytest.mark.parametrize("sizes", [(5, 2), (100, 100)])
def test_logits_of_models_that_apply_their_own_head(
    name: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are used unchanged, and logits beyond the ids that take part get no gradient."""
    monkeypatch.setattr(fused_inputs, "chunk_sizes", lambda *_: ChunkSizes(*sizes))
    source = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 23, 40, generator=source, dtype=torch.float64)
    labels, terms = (
        torch.randint(0, 37, (23,), generator=source),
        LossTerms(name, temperature=0.7, sft_ratio=0.3),
    )
    ids, eye = (
        VocabMap(38, torch.arange(38) == 37),
        OutputHead(nn.Parameter(torch.eye(40, dtype=torch.float64)), None, 1.0, None),
    )
    expected = plain(student.requires_grad_(), eye, labels, terms, ids, teacher, eye)
    no_head = OutputHead(None, None, 1.0, None, 40)
    actual = loss_sums(
        student, no_head, labels, terms, vocab=ids, teacher_hidden=teacher, teacher_head=no_head
    )
    expected_gradients, gradients = (
        torch.autograd.grad(total[0], student) for total in (expected, actual)
    )
    for value, reference in zip(
        (*actual, *gradients), (*expected, *expected_gradients), strict=True
    ):
        assert torch.allclose(value, reference.detach(), rtol=1e-9, atol=1e-10)
    assert not gradients[0][:, 38:].any()


def test_bfloat16_is_nearer_to_float64_than_plain_bfloat16() -> None:
    terms, ids = LossTerms("fkl", temperature=1.0, sft_ratio=0.2), VocabMap(40)
    gradients = {}
    for kind in (torch.float64, torch.bfloat16):
        student, teacher, hidden, teacher_hidden, labels = heads(
            kind, bias=False, scale=1.0, cap=None
        )
        gradients[kind] = torch.autograd.grad(
            plain(hidden, student, labels, terms, ids, teacher_hidden, teacher)[0], student.weight
        )[0].double()
        if kind == torch.bfloat16:
            sums = loss_sums(
                hidden,
                student,
                labels,
                terms,
                vocab=ids,
                teacher_hidden=teacher_hidden,
                teacher_head=teacher,
            )
            fused = torch.autograd.grad(sums[0], student.weight)[0].double()
    error = lambda gradient: float((gradient - gradients[torch.float64]).norm())  # noqa: E731
    assert error(fused) <= error(gradients[torch.bfloat16]) * 1.05


def test_a_teacher_may_be_more_precise_than_its_student() -> None:
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float32, bias=False, scale=1.0, cap=None
    )
    small = OutputHead(nn.Parameter(student.weight.bfloat16()), None, 1.0, None)
    sums = loss_sums(
        hidden.bfloat16(),
        small,
        labels,
        LossTerms("fkl"),
        vocab=VocabMap(40),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher,
    )
    exact = loss_sums(
        hidden,
        student,
        labels,
        LossTerms("fkl"),
        vocab=VocabMap(40),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher,
    )
    assert torch.allclose(sums[0], exact[0], rtol=0.02)


def test_no_loss_tokens_still_touch_every_parameter() -> None:
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float32, bias=True, scale=1.0, cap=None
    )
    hidden.requires_grad_()
    sums = loss_sums(
        hidden[:0],
        student,
        labels[:0],
        LossTerms("fkl", sft_ratio=0.3),
        vocab=VocabMap(40),
        teacher_hidden=teacher_hidden[:0],
        teacher_head=teacher,
    )
    sums[0].backward()
    assert sums[0].item() == 0
    assert student.weight.grad is not None and (student.weight.grad == 0).all()
    assert student.bias is not None and student.bias.grad is not None and hidden.grad is not None


@pytest.mark.parametrize("name", ["fkl", "akl"])
def test_no_gradient_is_computed_under_no_grad(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are the same as with gradients."""
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float32, bias=True, scale=0.5, cap=7.0
    )
    teacher_arguments: dict[str, Any] = {
        "vocab": VocabMap(40),
        "teacher_hidden": teacher_hidden,
        "teacher_head": teacher,
    }
    expected = loss_sums(
        hidden, student, labels, LossTerms(name, sft_ratio=0.3), **teacher_arguments
    )
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        actual = loss_sums(
            hidden, student, labels, LossTerms(name, sft_ratio=0.3), **teacher_arguments
        )
    assert torch.equal(torch.stack(actual), torch.stack(expected)) and not actual[0].requires_grad


def test_a_budget_below_one_row_names_the_minimum() -> None:
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float32, bias=False, scale=1.0, cap=None
    )
    with pytest.raises(RecipeError, match="give at least 1440 bytes"):
        loss_sums(
            hidden,
            student,
            labels,
            LossTerms("fkl"),
            vocab=VocabMap(40),
            teacher_hidden=teacher_hidden,
            teacher_head=teacher,
            chunk_bytes=1439,
        )


def test_a_divergence_without_a_teacher_is_refused() -> None:
    student, _, hidden, _, labels = heads(torch.float32, bias=False, scale=1.0, cap=None)
    with pytest.raises(RecipeError, match=r"loss\.name=fkl needs a teacher"):
        loss_sums(hidden, student, labels, LossTerms("fkl"), vocab=VocabMap(40))


@pytest.mark.parametrize("name", ["fkl", "akl", "sft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget", [1 << 20, 64 << 20, 1 << 30])
def test_chunks_and_blocks_fit_the_budget(name: str, dtype: torch.dtype, budget: int) -> None:
    size = 1000
    sizes = chunk_sizes(name, size, budget, dtype, torch.device("cpu"))
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    assert sizes.block >= 1
    used = sizes.chunk * 2 * size * dtype.itemsize + sizes.block * token_losses.row_bytes(
        name, size, kind
    )
    assert budget - 2 * size * dtype.itemsize < used <= budget


def test_a_second_backward_is_refused() -> None:
    student, teacher, hidden, teacher_hidden, labels = heads(
        torch.float32, bias=False, scale=1.0, cap=None
    )
    total, *_ = loss_sums(
        hidden.requires_grad_(),
        student,
        labels,
        LossTerms("fkl"),
        vocab=VocabMap(40),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher,
    )
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward only once"):
        total.backward()


class ModuleCase:
    """A `LossHead` with a masked id and a teacher with other ids, and its inputs."""

    def __init__(self) -> None:
        self.student, self.teacher, self.hidden, self.teacher_hidden, self.labels = heads(
            torch.float64, bias=True, scale=0.5, cap=7.0
        )
        mapped = torch.randperm(44, generator=torch.Generator().manual_seed(5))[:38]
        self.ids, self.budget = VocabMap(38, torch.arange(38) == 37, mapped), 1 << 20
        self.module = LossHead(self.student, self.ids, self.budget)
        empty, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(23, dtype=torch.int64)
        self.batch = Batch(empty, None, None, None, none, self.labels, none, (0,), "train")

    def losses(self, name: str) -> Any:
        return self.module(
            self.hidden,
            self.batch,
            LossTerms(name, sft_ratio=0.3),
            self.teacher_hidden,
            self.teacher,
        )


def test_the_module_gives_the_losses_of_its_head_and_ids() -> None:
    case = ModuleCase()
    expected = loss_sums(
        case.hidden,
        case.student,
        case.labels,
        LossTerms("rkl", sft_ratio=0.3),
        vocab=case.ids,
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher,
    )
    assert torch.equal(torch.stack(case.losses("rkl")), torch.stack(expected))
    case.module.chunk_bytes = 7
    with pytest.raises(
        RecipeError, match=r"loss\.chunk_memory_mb: 7 bytes do not hold one token over 38 ids"
    ):
        case.losses("rkl")


def test_the_module_has_the_parameters_of_its_head_and_masks_that_are_not_saved() -> None:
    case = ModuleCase()
    assert case.module.weight is case.student.weight and case.module.bias is case.student.bias
    cross_tokenizer_module = LossHead(
        case.student, VocabMap(40, teacher_masked=torch.arange(44) == 43), case.budget
    )
    for module, masks in (
        (case.module, {"masked", "teacher_ids"}),
        (cross_tokenizer_module, {"teacher_masked"}),
    ):
        assert {name for name, _ in module.named_buffers()} == masks
        assert set(module.state_dict()) == {"weight", "bias"}


def test_over_all_ids_covers_every_row_within_its_block_only() -> None:
    case = ModuleCase()
    full = torch.nn.functional.cross_entropy(
        case.student.logits(case.hidden), case.labels, reduction="sum"
    )
    before = torch.stack(case.losses("fkl"))
    with case.module.over_all_ids():
        inside = case.losses("sft")
    assert torch.allclose(inside[2], full) and not torch.allclose(before[2], full)
    with pytest.raises(KeyboardInterrupt), case.module.over_all_ids():
        raise KeyboardInterrupt
    assert torch.equal(torch.stack(case.losses("fkl")), before)
