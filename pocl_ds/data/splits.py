"""Splits: which samples are held out, by a hash of the prompt that a model reads.

The key of a sample is a hash of the rendered prompt of its first exchange: everything before the
first assistant turn that follows a user turn. Samples whose prompts render alike are therefore in
one split, however their records wrote them, and so are conversations that begin alike. The key
decides the split, and whether a limited selection includes the sample, so neither depends on the
order of a file.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.conversation import ASSISTANT, USER, Sample

KEY_BYTES = 16  # the first half decides the split, the second half a limited selection


def first_exchange(sample: Sample) -> Sample:
    """The sample through its first assistant turn after a user turn, which becomes its response."""
    has_question = False
    for number, message in enumerate(sample.messages[:-1]):
        if message.role == ASSISTANT and has_question:
            # `input` belongs to the last user message, which is not part of this beginning.
            return replace(sample, messages=sample.messages[: number + 1], input="")
        has_question = has_question or message.role == USER
    return sample


def split_key(sample: Sample, render_prompt: Callable[[Sample], str]) -> bytes:
    """The key of a sample: [KEY_BYTES].

    A sample without a prompt has the key of its text. Raises DataError as `render_prompt` does.
    """
    beginning = first_exchange(sample)
    text = render_prompt(beginning) if beginning.prompt else beginning.response.content
    normalized = unicodedata.normalize("NFC", text)
    # A template may write half a character, which has no UTF-8 form.
    return hashlib.sha256(normalized.encode(errors="surrogatepass")).digest()[:KEY_BYTES]


def assign_split(key: int, *, validation_fraction: float, test_fraction: float) -> str:
    """The split of the samples whose key begins with these 64 bits."""
    position = key / 2**64
    if position < test_fraction:
        return "test"
    return "validation" if position < test_fraction + validation_fraction else "train"


def smallest_rows(
    rows: NDArray[np.int64],
    keys: NDArray[np.uint64],
    ties: NDArray[np.uint64],
    limit: int | None,
) -> NDArray[np.int64]:
    """Those `limit` of the ascending `rows` with the smallest keys, of equal keys the smaller tie.

    rows: [rows]; keys, ties: [samples]. All rows if limit is None.
    """
    if limit is None or limit >= len(rows):
        return rows
    order = np.lexsort((ties[rows], keys[rows]))
    return np.sort(rows[order[:limit]])
