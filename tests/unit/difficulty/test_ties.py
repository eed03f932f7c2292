"""Tied scores: why values of ROUGE-L are 0, and the warning."""

from __future__ import annotations

import pytest

from pocl_ds.difficulty.ties import MAX_TIED_FRACTION, ZeroCounts, count_zeros, tie_warning


def test_zeros_are_counted_by_their_reason() -> None:
    responses = ["anything", "", "a cat", "北京", "a dog"]
    references = [["北京"], ["a dog"], ["nothing", "x"], ["北京", "city"], ["a dog"]]
    values = [0.0, 0.0, 0.0, 0.0, 1.0]
    assert count_zeros(values, responses, references, "rouge_score") == ZeroCounts(1, 2, 1)
    assert count_zeros([0.0], ["广州"], [["北京"]], "characters") == ZeroCounts(0, 0, 1)


@pytest.mark.parametrize(
    ("zeros", "tokenizer", "cause"),
    [
        (ZeroCounts(60, 10, 10), "rouge_score", "set it to unicode_words or characters"),
        (ZeroCounts(60, 10, 10), "characters", "have neither letters nor digits"),
        (ZeroCounts(10, 60, 10), "rouge_score", "responses to 60 of 100 samples are empty"),
        (ZeroCounts(10, 10, 60), "rouge_score", "share nothing with the references: heal"),
        (ZeroCounts(0, 0, 5), "rouge_score", "short references"),
    ],
)
def test_the_commonest_cause_is_named(zeros: ZeroCounts, tokenizer: str, cause: str) -> None:
    message = tie_warning("rouge_l", 0.8, 100, zeros, tokenizer)
    assert message is not None and cause in message
    assert message.startswith("80% of the values of rouge_l are tied, so its ranks mean little: ")


def test_ties_of_the_cross_entropy_come_from_equal_samples() -> None:
    message = tie_warning("cross_entropy", 0.5, 100, ZeroCounts(100), "rouge_score")
    assert message is not None and "remove duplicates" in message and "heal" not in message


def test_few_ties_are_no_warning() -> None:
    assert tie_warning("rouge_l", MAX_TIED_FRACTION, 9, ZeroCounts(9), "rouge_score") is None
