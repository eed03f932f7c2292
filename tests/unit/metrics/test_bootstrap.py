"""The bootstrap: its samples, intervals and p-values, independent of the block size."""

from __future__ import annotations

import numpy as np
import pytest

from pocl_ds.metrics import bootstrap
from pocl_ds.metrics.bootstrap import percentile_interval, resampled_means, two_sided_p


def test_resampling_is_deterministic() -> None:
    values = np.arange(30.0)
    assert np.array_equal(
        resampled_means(values, resamples=50), resampled_means(values, resamples=50)
    )
    assert not np.array_equal(
        resampled_means(values, resamples=50), resampled_means(values, resamples=50, seed=[0, 1])
    )


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_spread_equals_the_standard_error(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "NUMBERS_PER_BLOCK", block)
    values = np.random.default_rng(0).normal(5.0, 3.0, 400)
    means = resampled_means(values, resamples=4000)
    assert means.shape == (4000,) and means.std() == pytest.approx(values.std() / 20, rel=0.05)
    low, high = percentile_interval(means)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)


def test_p_value_is_never_0() -> None:
    assert two_sided_p(np.ones(99)) == 2 / 100
    assert two_sided_p(np.array([-1.0] * 10 + [1.0] * 89)) == 22 / 100
    assert two_sided_p(np.zeros(99)) == 1.0
