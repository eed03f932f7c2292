"""Aligns the tokens of two tokenizers over one text, for losses across tokenizers.

Both write a response as pieces of bytes. Where a piece of one ends at the same byte as a piece of
the other, both have read the same text; the text between two such boundaries is a span.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ModelError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token, by id.

    Raises ModelError for a tokenizer that is neither byte-level BPE nor SentencePiece.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (
        json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
        if backend is not None
        else ""
    )
    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {index: token.encode() for token, index in tokenizer.get_added_vocab().items()}
    if "ByteLevel" in decoder:
        alphabet = _byte_level_alphabet()
        decode = lambda token: bytes(alphabet[character] for character in token)  # noqa: E731
    elif "\u2581" in decoder or "Metaspace" in decoder:
        decode = _sentencepiece_bytes
    else:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} is neither byte-level BPE nor "
            "SentencePiece, so the text of its tokens is unknown: choose another model, or "
            "policy.name=seqkd, which needs texts only"
        )
    return [
        added[index] if index in added else decode(token or "")
        for index, token in enumerate(tokens)
    ]


def common_spans(
    left: Sequence[bytes], right: Sequence[bytes]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The span of each piece of two divisions of one text, from 0; -1 for a piece without a span.

    A leading space that only one side has (SentencePiece) does not count. Where the texts differ,
    because one was truncated or normalized, the spans end before the difference.

    Args:
        left, right: the pieces of both divisions, n and m of them.

    Returns:
        Two arrays, [n] and [m].
    """
    left, right = _strip_extra_space(left, right), _strip_extra_space(right, left)
    left_ends, right_ends = (
        np.cumsum([len(piece) for piece in pieces], dtype=np.int64) for pieces in (left, right)
    )
    boundaries = np.intersect1d(left_ends, right_ends)
    boundaries = boundaries[boundaries <= _common_prefix_length(b"".join(left), b"".join(right))]

    def spans_at(ends: NDArray[np.int64]) -> NDArray[np.int64]:
        spans = np.searchsorted(boundaries, ends, side="left").astype(np.int64)
        return np.where(spans < len(boundaries), spans, -1)

    return spans_at(left_ends), spans_at(right_ends)


def _strip_extra_space(pieces: Sequence[bytes], other_pieces: Sequence[bytes]) -> list[bytes]:
    if pieces and pieces[0].startswith(b" ") and not b"".join(other_pieces[:1]).startswith(b" "):
        return [pieces[0][1:], *pieces[1:]]
    return list(pieces)


def _common_prefix_length(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right))
    differences = np.flatnonzero(
        np.frombuffer(left[:length], np.uint8) != np.frombuffer(right[:length], np.uint8)
    )
    return int(differences[0]) if len(differences) else length


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE (GPT-2) writes for each byte.

    Printable bytes stand for themselves, the other bytes for the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(unprintable)
    }


def _sentencepiece_bytes(token: str) -> bytes:
    if byte := BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()
