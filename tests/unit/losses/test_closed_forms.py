"""Closed forms against the functions of `divergences`: values, and gradients by autograd in
float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pocl_ds.config.registry import LOSSES
from pocl_ds.losses.closed_forms import CLOSED_FORMS
from pocl_ds.losses.divergences import DIVERGENCES, MASKED

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, LOSSES[name]) for name in CLOSED_FORMS),
    *(("jsd", {"beta": beta}) for beta in (0.0, 0.1, 0.9, 1.0)),
    *(("skl", {"skew": skew}) for skew in (0.0, 0.6, 1.0)),
    *(
        ("srkl", {"skew": skew, "detach_mixture": detach})
        for skew in (0.0, 0.6, 1.0)
        for detach in (False, True)
    ),
    *(("ab", {"ab_alpha": a, "ab_beta": b}) for a, b in ((1.0, 0.0), (0.0, 0.5), (0.0, 0.0))),
]
# They grow with p / q or q / p beyond any number, so that distant distributions overflow.
UNBOUNDED: list[tuple[str, dict[str, Any]]] = [
    ("ab", {"ab_alpha": a, "ab_beta": b}) for a, b in ((0.4, -0.4), (-0.2, 0.7), (1.5, -0.5))
]


def logits(spread: float, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(7)
    teacher, student = (
        torch.randn(9, 31, generator=source, dtype=torch.float64) * spread for _ in range(2)
    )
    student[0] = teacher[0]  # p = q
    return teacher.to(kind), student.to(kind)


def buffers_like(like: Tensor) -> Any:
    """The three buffers of a caller; their contents are undefined."""
    sides = {number: torch.full_like(like, torch.nan) for number in range(3)}
    return lambda number: sides[number]


class NoLargeAllocation(TorchDispatchMode):
    """Within the block every tensor of at least `size` numbers must be in known memory."""

    def __init__(self, size: int, known: set[int]) -> None:
        super().__init__()
        self.size, self.known = size, known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        actual = func(*args, **(kwargs or {}))
        if isinstance(actual, Tensor) and actual.numel() >= self.size:
            assert actual.untyped_storage().data_ptr() in self.known, (
                f"{func} makes a tensor of the logits' size"
            )
        return actual


def by_autograd(
    name: str, options: dict[str, Any], teacher: Tensor, student: Tensor, masked: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = student.double().clone().requires_grad_()
    sides = [
        side.masked_fill(masked, -torch.inf).log_softmax(-1) for side in (teacher.double(), leaf)
    ]
    log_p, log_q = (side.masked_fill(masked, MASKED) for side in sides)
    value = DIVERGENCES[name](log_p, log_q, **options)
    constant = not value.requires_grad  # skl with skew = 1 does not depend on the student
    return value.detach(), torch.zeros_like(leaf) if constant else torch.autograd.grad(
        value.sum(), leaf
    )[0]


@pytest.mark.parametrize(
    ("name", "options", "spread"),
    [
        *((*case, spread) for case in CASES for spread in (0.3, 3.0, 40.0)),
        *((*case, 0.3) for case in UNBOUNDED),
    ],
)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_value_and_gradient(
    name: str, options: dict[str, Any], spread: float, kind: torch.dtype, tolerance: float
) -> None:
    teacher, student = logits(spread, kind)
    masked = torch.zeros(31, dtype=torch.bool)
    masked[[4, 30]] = True
    expected_gradients, slope = by_autograd(name, options, teacher, student, masked)
    sides = (side.masked_fill(masked, -torch.inf).log_softmax(-1) for side in (teacher, student))
    log_p, log_q = (side.masked_fill(masked, MASKED) for side in sides)
    value = CLOSED_FORMS[name](log_p, log_q, buffers_like(log_p), **options)
    size = max(1.0, spread)
    assert torch.allclose(value.double(), expected_gradients, rtol=tolerance, atol=tolerance * size)
    assert torch.allclose(log_q.double(), slope, rtol=tolerance, atol=tolerance * size)
    assert (log_q[:, masked] == 0).all()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_huge_logits_stay_finite(name: str, options: dict[str, Any]) -> None:
    teacher, student = (
        torch.randn(4, 5000, generator=torch.Generator().manual_seed(s)).mul(1e4) for s in (1, 2)
    )
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    value = CLOSED_FORMS[name](log_p, log_q, buffers_like(log_p), **options)
    assert value.isfinite().all() and log_q.isfinite().all() and (value >= -1e-5).all()


@pytest.mark.parametrize(("name", "options"), [*CASES, *UNBOUNDED])
def test_no_memory_is_allocated_besides_the_buffers(name: str, options: dict[str, Any]) -> None:
    log_p, log_q = (side.log_softmax(-1) for side in logits(3.0, torch.float32))
    buffers = buffers_like(log_p)
    known = {
        tensor.untyped_storage().data_ptr() for tensor in (log_p, log_q, *map(buffers, range(3)))
    }
    with NoLargeAllocation(log_p.numel(), known):
        CLOSED_FORMS[name](log_p, log_q, buffers, **options)
