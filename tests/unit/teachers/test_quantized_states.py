"""Hidden states in 8 bits: their error against float64, and the error of the distributions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.teachers.quantized_states import LEVELS, QuantizedStates, distribution_error


def states(tokens: int, width: int, seed: int) -> torch.Tensor:
    """States with means that differ by channel, and some channels 50 times as large."""
    source = torch.Generator().manual_seed(seed)
    spread = torch.where(torch.rand(width, generator=source) < 0.1, 50.0, 0.7)
    mean = 3 * spread * torch.randn(width, generator=source)
    return mean + spread * torch.randn(tokens, width, generator=source)


@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 70),
    seed=st.integers(0, 9),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_state_is_rounded_to_a_level_of_its_token(
    tokens: int, width: int, seed: int, dtype: str
) -> None:
    hidden = states(40, width, seed).to(getattr(torch, dtype))
    codec = QuantizedStates.calibrate(hidden)
    part = hidden[:tokens]
    records = codec.encode(part)
    assert records.dtype == torch.uint8 and records.shape == (tokens, codec.bytes)
    assert codec.bytes == width + 4
    decoded = codec.decode(records, torch.float32).double()
    # By the formula, one token at a time.
    mean, spread = codec.mean.double(), codec.spread.double()
    for actual, exact in zip(decoded, part.double(), strict=True):
        level = ((exact - mean) / spread).abs().max() / LEVELS
        assert ((actual - exact).abs() <= (0.5 + 1e-3) * level * spread + 1e-5).all()
    assert codec.decode(records, torch.bfloat16).dtype == torch.bfloat16


def test_calibration_is_the_mean_and_spread_of_each_channel() -> None:
    hidden = states(500, 16, 0)
    codec = QuantizedStates.calibrate(hidden)
    torch.testing.assert_close(codec.mean.double(), hidden.double().mean(0), rtol=1e-5, atol=1e-5)
    expected = hidden.double().std(0, correction=0)
    torch.testing.assert_close(codec.spread.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_constant_channels_and_tokens_at_the_mean(value: float) -> None:
    """Also states of one token, whose spread is 0."""
    hidden = torch.full((5, 8), value)
    codec = QuantizedStates.calibrate(hidden)
    assert torch.equal(codec.decode(codec.encode(hidden), torch.float32), hidden)
    other = hidden + 1
    torch.testing.assert_close(codec.decode(codec.encode(other), torch.float32), other)


def test_channels_of_different_size_cost_less_than_one_scale_for_all() -> None:
    """What the calibration is for."""
    hidden = states(400, 64, 3)
    codec = QuantizedStates.calibrate(hidden[:100])
    error = codec.decode(codec.encode(hidden), torch.float32) - hidden
    scale = hidden.abs().amax(-1, keepdim=True) / LEVELS
    plain = (hidden / scale).round() * scale - hidden
    small = hidden.std(0) < 5
    assert error[:, small].square().mean() < plain[:, small].square().mean() / 100


def test_the_error_of_distributions() -> None:
    source = torch.Generator().manual_seed(1)
    exact, stored = torch.randn(2, 6, 11, generator=source)
    exact[:, 3] = stored[:, 3] = -torch.inf
    for temperature in (1.0, 1.7):
        p, q = ((side.double() / temperature).softmax(-1) for side in (exact, stored))
        allowed = [i for i in range(11) if i != 3]
        kl = (p[:, allowed] * (p[:, allowed] / q[:, allowed]).log()).sum()
        actual = distribution_error(exact, stored, temperature)
        expected = torch.stack([kl, (p - q).square().sum()])
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert distribution_error(exact, exact, 1.0).tolist() == [0.0, 0.0]
