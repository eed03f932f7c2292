"""Which tokens of two tokenizers stand for the same text: what a loss across tokenizers compares.

Both write a response as pieces of bytes. Where a piece of one ends at the same byte as a piece of
the other, both have read the same text; between two such places lies a span.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ModelError

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each id stands for, by id. Byte-level BPE and SentencePiece are known. Raises ModelError
    for any other kind.
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
        byte_of = _bytes_of_characters()
        read = lambda token: bytes(byte_of[character] for character in token)  # noqa: E731
    elif "\u2581" in decoder or "Metaspace" in decoder:
        read = _sentence_piece
    else:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} is neither byte-level BPE nor "
            f"SentencePiece, so that the text of its "
            "tokens is not known: choose another model, or policy.name=seqkd, which needs texts "
            "alone"
        )
    return [
        added[index] if index in added else read(token or "") for index, token in enumerate(tokens)
    ]


def common_spans(
    ours: Sequence[bytes], theirs: Sequence[bytes]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The span of each piece of two divisions of one text, from 0; -1 for pieces in none.

    A space that one side alone puts before the text (SentencePiece) does not count. Where the texts
    differ further on, as one of them was cut or normalised, spans end before that.
    """
    left, right = _without_space(ours, theirs), _without_space(theirs, ours)
    texts = b"".join(left), b"".join(right)
    ours_end, theirs_end = (
        np.cumsum([len(piece) for piece in pieces], dtype=np.int64) for pieces in (left, right)
    )
    places = np.intersect1d(ours_end, theirs_end)
    places = places[places <= _common_prefix(*texts)]

    def span(ends: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.searchsorted(places, ends, side="left").astype(np.int64)
        return np.where(found < len(places), found, -1)

    return span(ours_end), span(theirs_end)


def _without_space(pieces: Sequence[bytes], others: Sequence[bytes]) -> list[bytes]:
    if pieces and pieces[0].startswith(b" ") and not b"".join(others[:1]).startswith(b" "):
        return [pieces[0][1:], *pieces[1:]]
    return list(pieces)


def _common_prefix(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(
        np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8)
    )
    return int(differ[0]) if len(differ) else length


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a character: printable ones as themselves, the others from
    256 on (GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _sentence_piece(token: str) -> bytes:
    if byte := BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()
