"""The public functions on plain tensors: names, defaults, masks, reductions, and what they
import.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from pocl_ds import losses
from pocl_ds.config.registry import LOSSES
from pocl_ds.losses.cross_tokenizer import uld_with_gradient
from pocl_ds.losses.divergences import DIVERGENCES, fkl
from pocl_ds.losses.top_k import TopKCodec

KEYWORDS = {"temperature", "mask", "reduction", "scale_by_temperature_squared"}


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_each_divergence_is_a_function_with_the_recipes_defaults(name: str) -> None:
    function = getattr(losses, name)
    parameters = inspect.signature(function).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert {key: value for key, value in defaults.items() if key not in KEYWORDS} == LOSSES[name]
    student, teacher = logits(2, 3, 20), logits(2, 3, 20, seed=1)
    expected = losses.divergence(name, student, teacher, temperature=1.3)
    assert torch.equal(function(student, teacher, temperature=1.3), expected)
    assert function.__doc__ and "eq." in function.__doc__


def test_student_comes_first() -> None:
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    forward = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.fkl(student, teacher, reduction="none"), forward)
    reverse = losses.rkl(teacher, student, reduction="none")
    torch.testing.assert_close(reverse, forward)


def test_mask_and_reduction() -> None:
    student, teacher = logits(2, 3, 9), logits(2, 3, 9, seed=1)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    per_token = losses.skl(student, teacher, reduction="none")
    masked = losses.skl(student, teacher, mask=mask, reduction="none")
    assert torch.equal(masked, torch.where(mask, per_token, 0.0))
    torch.testing.assert_close(
        losses.skl(student, teacher, mask=mask, reduction="sum"), per_token[mask].sum()
    )
    torch.testing.assert_close(losses.skl(student, teacher, mask=mask), per_token[mask].mean())
    assert losses.skl(student, teacher, mask=torch.zeros_like(mask)) == 0
    # A token that does not count may hold anything.
    student[0, 1] = float("nan")
    torch.testing.assert_close(losses.skl(student, teacher, mask=mask), per_token[mask].mean())


def test_wrong_arguments_are_named() -> None:
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    with pytest.raises(ValueError, match=r"student_logits has shape \(4, 9\) and teacher_logits"):
        losses.fkl(student, teacher[:, :8])
    with pytest.raises(ValueError, match=r"mask has shape \(3,\): give one flag per token, \(4,\)"):
        losses.fkl(student, teacher, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction='batchmean': choose none, mean or sum"):
        losses.fkl(student, teacher, reduction="batchmean")  # type: ignore[arg-type]


def test_uld_equals_its_closed_form() -> None:
    student, teacher = logits(6, 13).requires_grad_(), logits(6, 17, seed=1)
    value = losses.uld(student, teacher, temperature=1.5, reduction="none")
    log_p, log_q = (side.div(1.5).log_softmax(-1) for side in (teacher, student.detach()))
    expected, slope = uld_with_gradient(log_p, log_q)
    torch.testing.assert_close(value, 1.5**2 * expected)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, 1.5 * slope)


def test_alm_compares_whether_a_span_is_written() -> None:
    log_q, log_p = -logits(5).abs(), -logits(5, seed=1).abs()
    p, q = (log_p / 2).exp(), (log_q / 2).exp()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(losses.alm(log_q, log_p, temperature=2.0), 4 * expected.mean())


def test_the_truncation_error_is_a_forward_kl() -> None:
    """The error of cached top-k records is a forward KL too."""
    teacher, codec = logits(7, 30), TopKCodec(4, 30, (1.0,))
    records = codec.encode(teacher)
    ids, stored = codec.decode(records, 1.0)
    other_id = stored[:, -1:] - torch.log(torch.tensor(30.0 - 4))
    spread = other_id.expand(7, 30).scatter(-1, ids, stored[:, :-1])
    log_p = teacher.float().log_softmax(-1)
    expected = fkl(log_p, spread).sum()
    torch.testing.assert_close(codec.error_sums(teacher, records)[0, 1].float(), expected)


class Heads:
    """Hidden states and heads of student and teacher, and labels of which some do not count."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.student, self.teacher = logits(2, 5, 8).to(dtype), logits(2, 5, 12, seed=1).to(dtype)
        self.weight = logits(20, 8, seed=2).to(dtype).requires_grad_()
        self.bias = logits(20, seed=3).to(dtype).requires_grad_()
        self.teacher_weight = logits(24, 12, seed=4).to(dtype)
        self.labels = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(5))
        self.labels[0, :2] = -100
        self.student.requires_grad_()

    def fused(self, loss: Any = losses.fused_linear_distillation_loss, **settings: Any) -> Any:
        return loss(
            self.student,
            self.weight,
            self.teacher,
            self.teacher_weight,
            self.labels,
            self.bias,
            **settings,
        )

    def plain(self, name: str, sft_ratio: float, temperature: float, **options: Any) -> Any:
        student = self.student @ self.weight.T + self.bias
        teacher = (self.teacher @ self.teacher_weight.T)[..., :20]
        mask = self.labels != -100
        ce = torch.nn.functional.cross_entropy(student[mask], self.labels[mask])
        kd = losses.divergence(
            name, student, teacher, temperature=temperature, mask=mask, **options
        )
        return sft_ratio * ce + (1 - sft_ratio) * kd


@pytest.mark.parametrize("name", [*DIVERGENCES, "sft"])
@pytest.mark.parametrize("chunk_memory_mb", [0.01, 512])
def test_fused_head_and_loss_equal_the_plain_form(name: str, chunk_memory_mb: float) -> None:
    heads = Heads()
    sft_ratio = 1.0 if name == "sft" else 0.3
    expected = heads.plain(name, sft_ratio, 1.6)
    loss = heads.fused(
        divergence=name, sft_ratio=sft_ratio, temperature=1.6, chunk_memory_mb=chunk_memory_mb
    )
    torch.testing.assert_close(loss, expected)
    leaves = [heads.student, heads.weight, heads.bias]
    gradients = zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    )
    for gradient, expected_gradient in gradients:
        torch.testing.assert_close(gradient, expected_gradient)


def test_the_module_is_the_function() -> None:
    heads = Heads(torch.float32)
    settings: dict[str, Any] = {"temperature": 1.5, "sft_ratio": 0.2, "reduction": "sum"}
    module = losses.FusedLinearDistillationLoss("skl", skew=0.3, **settings)
    assert not list(module.parameters())
    loss = heads.fused(module)
    assert torch.equal(loss, heads.fused(divergence="skl", skew=0.3, **settings))
    torch.testing.assert_close(loss, 8 * heads.plain("skl", 0.2, 1.5, skew=0.3))


def test_a_batch_without_labels_is_zero_and_has_a_gradient() -> None:
    heads = Heads(torch.float32)
    heads.labels[:] = -100
    loss = heads.fused()
    loss.backward()
    assert loss == 0 and heads.weight.grad is not None and not heads.weight.grad.any()


def test_the_import_loads_no_heavy_library() -> None:
    heavy = ("transformers", "deepspeed", "vllm", "datasets", "peft")
    code = (
        "import sys, pocl_ds.losses\n"
        f"sys.exit(', '.join(name for name in {heavy!r} if name in sys.modules) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
