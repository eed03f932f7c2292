"""The check that a sample's log-probabilities depend on it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocl_ds.errors import ModelError
from pocl_ds.models.batch_invariance import check_batch_invariance, choose_samples

IDS, TOKENS = ["a", "b", "c"], [4, 10, 1]


@given(
    lengths=st.lists(st.integers(1, 50), max_size=12),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 200),
    packed=st.booleans(),
    max_samples=st.none() | st.integers(1, 5),
)
def test_the_chosen_samples_fit_into_one_batch(
    lengths: list[int], seed: int, max_tokens: int, packed: bool, max_samples: int | None
) -> None:
    sizes = np.array(lengths, np.int64)
    rows = choose_samples(
        sizes, seed=seed, max_tokens=max_tokens, packed=packed, max_samples=max_samples
    )
    assert len(set(rows)) == len(rows) <= min(4, max_samples or 4)
    chosen = sizes[rows]
    assert (chosen.sum() if packed else len(rows) * chosen.max(initial=0)) <= max_tokens
    two_fit = len(sizes) > 1 and np.sort(sizes)[: 2 if packed else 1].sum() <= max_tokens
    if not rows:
        assert max_samples == 1 or not two_fit or 2 * np.sort(sizes)[1] > max_tokens
    else:
        assert len(rows) > 1 and chosen.min() == sizes.min()


def test_longest_shortest_median_and_a_random_sample() -> None:
    lengths = np.array([30, 10, 50, 20, 40, 60, 70], np.int64)
    chosen = [
        choose_samples(lengths, seed=seed, max_tokens=1000, packed=False) for seed in range(20)
    ]
    assert all(lengths[rows[:3]].tolist() == [70, 10, 40] for rows in chosen)
    assert len({rows[3] for rows in chosen}) > 1
    # A sample that fills a batch alone is never in one with others.
    assert lengths[choose_samples(lengths, seed=0, max_tokens=110, packed=False)[0]] == 50


def computed(
    *, batch_shift: float = 0.0, shift: float = 0.0, sums: bool = False
) -> Any:  # a `LogProbs`
    """Log-probabilities of -1 per token, with a shift for every batch mate of the last sample."""

    def log_probs(places: Sequence[int]) -> list[NDArray[np.float64]]:
        mates = len(places) - 1
        values = [
            np.full(TOKENS[place], -1.0 + shift + (batch_shift * mates if place == 1 else 0.0))
            for place in places
        ]
        return [value.sum(keepdims=True) for value in values] if sums else values

    return log_probs


def check(log_probs: Any, dtype: str = "float32", **options: Any) -> dict[str, Any]:
    options = {"remedy": "do this", **options}
    return check_batch_invariance("score", IDS, TOKENS, log_probs, dtype=dtype, **options)


@pytest.mark.parametrize("sums", [False, True])
def test_the_largest_difference_is_reported(sums: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pocl_ds")
    info = check(computed(batch_shift=1e-4, sums=sums), reference=("vllm", computed()))
    assert info["samples"] == 3
    assert info["largest_difference"] == pytest.approx(2e-4)
    assert caplog.messages == [
        "score: 3 samples have the same log-probabilities alone and in a batch of 3 and in vllm, "
        "up to 2.0e-04 nats a token"
    ]


@pytest.mark.parametrize(
    ("log_probs", "options", "place"),
    [
        (
            computed(batch_shift=0.25),
            {},
            "b .10 .* is 10.0000 nats alone and 5.0000 in a batch of 3",
        ),
        (computed(batch_shift=float("nan")), {}, "nan in a batch of 3"),
        (computed(), {"reference": ("vllm", computed(shift=0.5))}, "a .4 .* and 2.0000 in vllm"),
    ],
)
def test_a_difference_beyond_rounding_is_an_error(
    log_probs: Any, options: dict[str, Any], place: str
) -> None:
    with pytest.raises(
        ModelError, match=rf"^score: the cross-entropy of sample .*{place}.*do this$"
    ):
        check(log_probs, **options)


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "largest"),
    [
        ("float32", False, 1e-3),
        ("float32", True, 1e-2 + 0.05 / 10),
        ("bfloat16", False, 0.1 + 0.5 / 10),
    ],
)
def test_the_tolerance_by_dtype(dtype: str, on_gpu: bool, largest: float) -> None:
    check(computed(batch_shift=0.49 * largest), dtype, on_gpu=on_gpu)
    with pytest.raises(ModelError):
        check(computed(batch_shift=0.51 * largest), dtype, on_gpu=on_gpu)


def test_differences_of_tokens_do_not_cancel() -> None:
    def log_probs(places: Sequence[int]) -> list[NDArray[np.float64]]:
        signs = np.resize([1.0, -1.0], 10) * 0.1 * (len(places) - 1)
        return [np.full(10, -1.0) + signs for _ in places]

    with pytest.raises(ModelError):
        check(log_probs)


def test_without_batches_there_is_nothing_to_compare() -> None:
    info = check_batch_invariance("score", [], [], computed(), dtype="float32", remedy="")
    assert info == {"samples": 0}
