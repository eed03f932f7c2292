"""Temperature, SFT ratio and learning rate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.curriculum.schedules import learning_rate, stage_values


@given(st.integers(2, 30), st.floats(0.1, 10), st.floats(0.1, 10))
def test_stage_values_are_interpolated_linearly(stages: int, start: float, end: float) -> None:
    values = stage_values(stages, (start, end))
    assert (values[0], values[-1], len(values)) == (start, end, stages)
    assert values == pytest.approx(
        [start + (end - start) * i / (stages - 1) for i in range(stages)]
    )


def test_single_stage_gets_the_first_value() -> None:
    assert stage_values(1, (1.0, 2.0)) == [1.0]


def test_learning_rate_is_torchs_cosine() -> None:
    """The release steps CosineAnnealingLR(T_max=total, eta_min=min_lr) after each step."""
    total, lr, min_lr = 37, 1e-4, 1e-7
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=min_lr)
    for step in range(total + 1):
        assert learning_rate(step, total, lr=lr, min_lr=min_lr) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9
        )
        optimizer.step()
        schedule.step()


@given(st.integers(1, 200), st.integers(0, 60))
def test_learning_rate_rises_then_falls_between_its_bounds(total: int, warmup: int) -> None:
    rates = [
        learning_rate(step, total, lr=1e-3, min_lr=1e-6, warmup=warmup) for step in range(total)
    ]
    assert all(0 < rate <= 1e-3 for rate in rates)
    top = min(warmup, total)
    assert rates[:top] == sorted(set(rates[:top]))
    assert rates[top:] == sorted(set(rates[top:]), reverse=True)
    if warmup < total:
        assert rates[warmup] == 1e-3


def test_learning_rate_by_hand() -> None:
    """Three warm-up steps on the line to lr, then the cosine; after the last step it stays at
    min_lr.
    """
    rates = [learning_rate(step, 11, lr=1.0, min_lr=0.2, warmup=3) for step in range(15)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:12] == pytest.approx(
        [learning_rate(step, 8, lr=1.0, min_lr=0.2) for step in range(9)]
    )
    assert rates[7] == pytest.approx(0.6) and rates[11:] == pytest.approx([0.2] * 4)


def test_warmup_may_cover_almost_all_steps() -> None:
    assert [
        learning_rate(step, 6, lr=1.0, min_lr=0.2, warmup=5) for step in (5, 6)
    ] == pytest.approx([1.0, 0.2])
    assert learning_rate(5, 5, lr=1.0, min_lr=0.2, warmup=5) == 1.0
