"""Loss spikes."""

from __future__ import annotations

import pytest

from pocl_ds.runtime.loss_spikes import LossSpikes


def test_a_spike_is_a_jump_and_not_a_slope() -> None:
    spikes = LossSpikes()
    slope = [4.0 - 0.02 * step + 0.01 * (step % 3) for step in range(40)]
    assert [spikes.update(loss, 0) for loss in slope] == [None] * 40
    ratio = spikes.update(9.0, 0)
    assert ratio is not None and ratio == pytest.approx(9.0 / 3.5, rel=0.05)
    assert spikes.update(3.2, 0) is None
    # Another stage has another loss.
    assert [spikes.update(12.0, 1) for _ in range(5)] == [None] * 5


def test_a_small_rise_of_a_constant_loss_is_no_spike() -> None:
    spikes = LossSpikes()
    assert [spikes.update(2.0, 0) for _ in range(20)] == [None] * 20
    assert spikes.update(2.3, 0) is None
