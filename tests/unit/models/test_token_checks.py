"""Token ids that models cannot read or do not share, by name."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tiny_models
import torch
from numpy.typing import NDArray

from pocl_ds.errors import ModelError
from pocl_ds.models.token_checks import check_sequences, check_split, warn_of_tokens_beyond_rows
from pocl_ds.models.vocab import VocabMap

TOKENIZER = tiny_models.make_tokenizer()


class OneSample:
    """A split of one sample, whose tokens all train."""

    ids = np.array([b"s7"])

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def find_disallowed_token(
        self,
        allowed: NDArray[np.bool_],
        *,
        prompts: NDArray[np.bool_],
        rows: NDArray[np.int64] | None = None,
    ) -> tuple[int, int] | None:
        """See `TokenizedSplit.find_disallowed_token`."""
        bad = (token for token in self.tokens if token >= len(allowed) or not allowed[token])
        return next(((0, token) for token in bad), None)


def test_a_token_beyond_the_rows_names_the_model_that_lacks_it() -> None:
    vocab, rows = VocabMap(200), {"student": 320, "teacher": 200}
    check_split(OneSample(1, 199), vocab, TOKENIZER, rows)
    with pytest.raises(ModelError) as caught:
        check_split(OneSample(1, 200), vocab, TOKENIZER, rows, label="the test split: ")
    token = TOKENIZER.convert_ids_to_tokens(200)
    assert str(caught.value).startswith(
        f"the test split: sample s7 holds token id 200 ({token!r}), and the embedding of teacher "
        "has 200 rows: resize it to its tokenizer"
    )


def test_a_token_that_is_not_shared_has_its_own_remedy() -> None:
    masked = torch.zeros(320, dtype=torch.bool)
    masked[5] = True
    vocab, rows = VocabMap(320, masked), {"student": 320}
    with pytest.raises(ModelError) as caught:
        check_split(OneSample(5), vocab, TOKENIZER, rows, remedy="share it")
    token = TOKENIZER.convert_ids_to_tokens(5)
    assert str(caught.value) == (
        f"sample s7 holds token id 5 ({token!r}), which teacher and student do not share: share it"
    )


def test_prompts_beyond_the_rows() -> None:
    check_sequences([[1, 2], []], TOKENIZER, {"m": 3}, "a prompt")
    check_sequences([], TOKENIZER, {"m": 3}, "a prompt")
    with pytest.raises(ModelError, match=r"^a prompt holds token id 3 \(.*\), and .* m has 3 rows"):
        check_sequences([[1, 2], [0, 3, 1]], TOKENIZER, {"n": 4, "m": 3}, "a prompt")


def test_unused_tokens_beyond_the_rows_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_tokens_beyond_rows(TOKENIZER, {"large": 320})
        assert not caplog.records
        warn_of_tokens_beyond_rows(TOKENIZER, {"small": 310})
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "tokens beyond the 310 rows of the embedding of small: 10 ("
    )
