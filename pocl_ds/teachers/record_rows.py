"""Rows of the cache of records on disk: the records of one sample, in fewer bytes.

The ids of a record ascend, so that their differences are small: those of all tokens of a row are
split into planes of bytes and compressed by zstd. Numbers and distances are stored as they are,
since they hardly shrink (docs/results/speed.md). Unused slots of a record repeat its last id; they
are not stored.

Shapes: n tokens, m ids in a record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pocl_ds.losses.record_codec import RecordCodec

LEVEL = 3  # of zstd: higher ones gain a percent
FRAME_BYTES = 128  # more than the header of a zstd frame


def row_capacity(codec: RecordCodec, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes that the rows of these numbers of tokens have at most, compressed."""
    planes = _planes(codec) * codec.slots * tokens
    token_bytes = 2 + 4 * _numbers(codec) + 2 * codec.slots * codec.has_distances
    return np.asarray(token_bytes * tokens + planes + (planes >> 8) + FRAME_BYTES)


def compress_row(codec: RecordCodec, records: NDArray[np.uint8]) -> bytes:
    """The stored form of records [n, bytes]."""
    if not len(records):
        return b""
    numbers, steps, ids = _split(codec, records)
    deltas = np.diff(ids, axis=1, prepend=0)
    used = np.ones(ids.shape, bool)
    if codec.has_unused_slots:
        used[:, 1:] = deltas[:, 1:] > 0
    planes = deltas[used].astype("<u4").view(np.uint8).reshape(-1, 4)[:, : _planes(codec)]
    parts = [numbers.tobytes(), planes.T.tobytes()]
    parts[1] = pa.Codec("zstd", compression_level=LEVEL).compress(parts[1], asbytes=True)
    if steps is not None:
        parts.insert(1, steps[used].tobytes())
    if codec.has_unused_slots:
        parts.insert(0, used.sum(1).astype("<u2").tobytes())
    return b"".join(parts)


def decompress_row(codec: RecordCodec, data: bytes, tokens: int) -> NDArray[np.uint8]:
    """Records [n, bytes] of their stored form. Raises ValueError if it is damaged."""
    if not tokens:
        return np.empty((0, codec.bytes), np.uint8)
    counts, start = np.full(tokens, codec.slots, np.int64), 0
    if codec.has_unused_slots:
        counts, start = np.frombuffer(data, "<u2", tokens).astype(np.int64), 2 * tokens
    used = np.arange(codec.slots) < counts[:, None]
    total = int(used.sum())
    numbers = np.frombuffer(data, np.uint8, 4 * _numbers(codec) * tokens, start)
    start += numbers.size
    steps = None
    if codec.has_distances:
        steps = np.zeros(used.shape, "<u2")
        steps[used] = np.frombuffer(data, "<u2", total, start)
        last = np.minimum(np.arange(codec.slots), counts[:, None] - 1)
        steps = np.take_along_axis(steps, last, 1)
        start += 2 * total
    size = _planes(codec) * total
    try:
        planes = pa.decompress(data[start:], decompressed_size=size, codec="zstd", asbytes=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from None
    deltas = np.zeros((total, 4), np.uint8)
    deltas[:, : _planes(codec)] = np.frombuffer(planes, np.uint8).reshape(_planes(codec), -1).T
    ids = np.zeros(used.shape, np.int64)
    ids[used] = deltas.view("<u4")[:, 0]
    return _join(codec, numbers.reshape(tokens, -1), steps, ids.cumsum(1))


def _numbers(codec: RecordCodec) -> int:
    return codec.header_size + codec.has_distances


def _planes(codec: RecordCodec) -> int:
    """Bytes of an id."""
    return 2 if codec.size <= 1 << 16 else 3


def _split(
    codec: RecordCodec, records: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[Any] | None, NDArray[np.int64]]:
    """Numbers [n, bytes], distances [n, m] uint16 and ids [n, m] of records."""
    start, width = 4 * _numbers(codec), 2 * codec.slots
    numbers, steps = records[:, :start], None
    if codec.has_distances:
        steps = np.ascontiguousarray(records[:, start : start + width]).view("<u2")
        start += width
    low = np.ascontiguousarray(records[:, start : start + width]).view("<u2").astype(np.int64)
    if codec.high_bytes:
        high = records[:, start + width : start + width + codec.high_bytes, None]
        bits = ((high >> np.array([0, 2, 4, 6], np.uint8)) & 3).reshape(len(records), -1)
        low |= bits[:, : codec.slots].astype(np.int64) << 16
    return numbers, steps, low


def _join(
    codec: RecordCodec,
    numbers: NDArray[np.uint8],
    steps: NDArray[Any] | None,
    ids: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """The inverse of `_split`."""
    records = np.zeros((len(ids), codec.bytes), np.uint8)
    parts = [numbers, *([] if steps is None else [steps.astype("<u2").view(np.uint8)])]
    parts.append((ids & 0xFFFF).astype("<u2").view(np.uint8))
    if codec.high_bytes:
        high = np.zeros((len(ids), 4 * codec.high_bytes), np.uint8)
        high[:, : codec.slots] = ids >> 16
        shifted = high.reshape(len(ids), -1, 4) << np.array([0, 2, 4, 6], np.uint8)
        parts.append(shifted.sum(-1, dtype=np.uint8))
    joined = np.concatenate(parts, 1)
    records[:, : joined.shape[1]] = joined
    return records
