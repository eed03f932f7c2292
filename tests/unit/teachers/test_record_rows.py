"""Compressed rows of records: what is read is what was written, and damage is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.losses.record_codec import MAX_IDS, RecordCodec
from pocl_ds.losses.sampled_logits import SampledCodec
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.runtime.hashing import token_keys
from pocl_ds.teachers.record_rows import compress_row, decompress_row, row_capacity


@st.composite
def codecs(draw: st.DrawFn) -> RecordCodec:
    """Codecs of every kind. Sizes are those where ids need another bit."""
    size = draw(st.sampled_from([10, 1 << 16, (1 << 16) + 1, MAX_IDS]))
    temperatures = draw(st.sampled_from([(1.0,), (1.0, 2.0)]))
    slots = draw(st.integers(1, 10))
    if draw(st.booleans()):
        return SampledCodec(slots, size, temperatures)
    return TopKCodec(slots, size, temperatures, draw(st.sampled_from([None, 0.4, 1.0])))


@settings(max_examples=60, deadline=None)
@given(codec=codecs(), tokens=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_row_is_what_it_was(codec: RecordCodec, tokens: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(4, codec.size, generator=source)
    records = codec.encode(logits, token_keys(seed, [b"s"], [4])).numpy()[:tokens]
    data = compress_row(codec, records)
    assert len(data) <= row_capacity(codec, np.array([tokens]))[0]
    assert np.array_equal(decompress_row(codec, data, tokens), records)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 300), seed=st.integers(0, 99), large=st.booleans())
def test_rows_that_do_not_shrink_have_room(tokens: int, seed: int, large: bool) -> None:
    """Random ids and distances."""
    codec = TopKCodec(16, MAX_IDS if large else 1 << 16, (1.0,))
    source = np.random.default_rng(seed)
    ids = torch.from_numpy(source.integers(0, codec.size, (tokens, 16)))
    numbers, distances = (torch.rand(tokens, count) for count in (1, 16))
    records = codec.pack(numbers, ids, distances).numpy()
    data = compress_row(codec, records)
    assert len(data) <= row_capacity(codec, np.array([tokens]))[0]
    assert np.array_equal(decompress_row(codec, data, tokens), records)


def test_a_row_takes_fewer_bytes_than_its_records() -> None:
    logits = 6 * torch.randn(64, 1 << 16, generator=torch.Generator().manual_seed(0))
    sizes = []
    for top_p in (None, 0.9):
        codec = TopKCodec(64, 1 << 16, (1.0,), top_p)
        records = codec.encode(logits).numpy()
        sizes.append(len(compress_row(codec, records)) / records.size)
    assert sizes[0] < 0.95 and sizes[1] < sizes[0]


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_damage_is_an_error_or_gives_records_of_the_same_size(top_p: float | None) -> None:
    """Reading never fails in another way: checksums find what decompression does not."""
    codec = TopKCodec(8, 300, (1.0, 2.0), top_p)
    records = codec.encode(torch.randn(9, 300, generator=torch.Generator().manual_seed(1)))
    data = compress_row(codec, records.numpy())
    for place in range(len(data)):
        for damaged in (
            data[:place],
            data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :],
        ):
            try:
                read = decompress_row(codec, damaged, len(records))
            except ValueError:
                continue
            assert read.shape == records.shape
