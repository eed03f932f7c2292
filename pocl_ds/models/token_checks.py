"""Checks of token ids before a model reads them: an id beyond the rows of an embedding, or one that
teacher and student do not share, becomes a sentence that names the token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import ModelSource
from pocl_ds.errors import ModelError
from pocl_ds.models.load import embedding_rows, load_model_config
from pocl_ds.models.vocab import VocabMap

log = logging.getLogger("pocl_ds")

# Remedies for a token that teacher and student do not share: in training, and in evaluation.
CHOOSE_A_PAIR = "choose a pair that shares its tokens, or remove the sample"
SHARE_A_TOKENIZER = "choose models that share a tokenizer, or set evaluate.held_out_loss=false"
NAMED_TOKENS = 3  # in a warning


class TokenSplit(Protocol):
    """What the checks need of a tokenized split; see `TokenizedSplit`."""

    ids: NDArray[np.bytes_]

    def find_disallowed_token(
        self,
        allowed: NDArray[np.bool_],
        *,
        prompts: NDArray[np.bool_],
        rows: NDArray[np.int64] | None = None,
    ) -> tuple[int, int] | None:
        """Row and id of the first token that is not allowed."""


def read_embedding_rows(sources: Iterable[tuple[ModelSource, str]]) -> dict[str, int]:
    """Rows of the embeddings of models, by folder or Hub name. Reads only configurations."""
    return {
        path: embedding_rows(
            load_model_config(
                path, trust_remote_code=source.trust_remote_code, revision=source.revision
            )
        )
        for source, path in sources
    }


def rows_by_reader(
    vocab: VocabMap,
    student: tuple[ModelSource, str],
    teachers: Iterable[tuple[ModelSource, str]] = (),
) -> dict[str, int]:
    """Rows of the models that read the student's ids as they are: the student, and teachers whose
    ids are not mapped.
    """
    return read_embedding_rows([student, *(teachers if vocab.teacher_ids is None else ())])


def check_split(
    split: TokenSplit,
    vocab: VocabMap,
    tokenizer: Any,
    rows: Mapping[str, int],
    *,
    label: str = "",
    members: NDArray[np.int64] | None = None,
    remedy: str = CHOOSE_A_PAIR,
) -> None:
    """Check that every token that trains takes part in the softmax, or its loss would be infinite,
    and that every other token can be read.

    Args:
        tokenizer: names the tokens.
        rows: rows of the embedding of each model that reads these ids.
        label: before the name of the sample, as in `the test split: `.
        members: rows of the split to check; None for all.
        remedy: for a token that teacher and student do not share.

    Raises:
        ModelError: for the first token that fails; the message names the sample.
    """
    disallowed = split.find_disallowed_token(
        vocab.allowed, prompts=vocab.teacher_readable, rows=members
    )
    if disallowed is not None:
        row, token = disallowed
        problem = _problem_beyond_rows(token, tokenizer, rows) or (
            f"{_describe(token, tokenizer)}, which teacher and student do not share: {remedy}"
        )
        raise ModelError(f"{label}sample {split.ids[row].decode()} holds {problem}")


def check_sequences(
    sequences: Iterable[Sequence[int]], tokenizer: Any, rows: Mapping[str, int], label: str
) -> None:
    """Check that models can read all these ids. label: what holds them, as in `a prompt`.

    Raises:
        ModelError: an id is beyond the rows of a model's embedding.
    """
    highest = max((max(ids, default=0) for ids in sequences), default=0)
    if problem := _problem_beyond_rows(highest, tokenizer, rows):
        raise ModelError(f"{label} holds {problem}")


def warn_of_tokens_beyond_rows(tokenizer: Any, rows: Mapping[str, int]) -> None:
    """Warn once for each model whose embedding is smaller than its tokenizer."""
    ids = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    for model, count in rows.items():
        beyond = [token for token, index in ids if index >= count]
        if beyond:
            names = ", ".join(map(repr, beyond[:NAMED_TOKENS]))
            log.warning(
                "tokens beyond the %d rows of the embedding of %s: %d (%s%s); a text that holds "
                "one is refused",
                count,
                model,
                len(beyond),
                names,
                ", ..." if len(beyond) > NAMED_TOKENS else "",
            )


def _describe(token: int, tokenizer: Any) -> str:
    return f"token id {token} ({tokenizer.convert_ids_to_tokens(token)!r})"


def _problem_beyond_rows(token: int, tokenizer: Any, rows: Mapping[str, int]) -> str | None:
    for model, count in rows.items():
        if token >= count:
            return (
                f"{_describe(token, tokenizer)}, and the embedding of {model} has {count} rows: "
                "resize it to its tokenizer (resize_token_embeddings of transformers) and save the "
                "model, or leave this token out of the template and the texts"
            )
    return None
