"""Loss positions: hidden state t predicts token t + 1; only responses and their EOS count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.data.batches import collate
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit


def write_split(folder: Path, samples: list[tuple[list[int], int]]) -> TokenizedSplit:
    """Write a split with these ids and prompt lengths."""
    names = [f"s{n}" for n in range(len(samples))]
    save_split(folder, "train", names, [ids for ids, _ in samples], [n for _, n in samples])
    return TokenizedSplit.open(folder, "train")


def test_loss_positions_of_three_tokens(tmp_path: Path) -> None:
    """Prompt 5, response 7, EOS 0, padded with EOS to four tokens: state 0 predicts 7, state 1
    predicts EOS, and nothing else counts.
    """
    split = write_split(tmp_path, [([5, 7, 0], 1), ([5, 6, 7, 0], 2)])
    batch = collate(split, [0, 1])
    assert batch.input_ids.tolist() == [[5, 7, 0, 0], [5, 6, 7, 0]]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]  # includes the real EOS, not the padding
    assert batch.positions.tolist() == [0, 1, 4 + 1, 4 + 2]
    assert batch.labels.tolist() == [7, 0, 7, 0]
    assert batch.sample_of_token.tolist() == [0, 0, 1, 1]
    assert batch.rows == (0, 1)


SAMPLES = st.lists(
    st.lists(st.integers(0, 9), min_size=2, max_size=12).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1))
    ),
    min_size=1,
    max_size=6,
)


@given(SAMPLES, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_collate_equals_a_plain_reference(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[tuple[list[int], int]],
    random: object,
) -> None:
    split = write_split(tmp_path_factory.mktemp("batch"), samples)
    rows = list(range(len(samples)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    batch = collate(split, np.array(rows))
    width = max(len(ids) for ids, _ in samples)
    positions, labels, sample_numbers = [], [], []
    for place, row in enumerate(rows):
        ids, prompt = samples[row]
        assert batch.input_ids[place].tolist() == ids + [0] * (width - len(ids))
        assert batch.attention_mask[place].tolist() == [1] * len(ids) + [0] * (width - len(ids))
        for token in range(prompt, len(ids)):
            positions.append(place * width + token - 1)
            labels.append(ids[token])
            sample_numbers.append(place)
    assert (batch.positions.tolist(), batch.labels.tolist(), batch.sample_of_token.tolist()) == (
        positions,
        labels,
        sample_numbers,
    )
    tensors = (
        batch.input_ids,
        batch.attention_mask,
        batch.positions,
        batch.labels,
        batch.sample_of_token,
    )
    assert all(tensor.dtype == torch.int64 for tensor in tensors)
    assert batch.rows == tuple(rows)


@given(SAMPLES, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_packed_holds_the_same_tokens_without_padding(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[list[int], int]], random: object
) -> None:
    split = write_split(tmp_path_factory.mktemp("packed"), samples)
    rows = list(range(len(samples)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    packed, padded = collate(split, rows, packed=True), collate(split, rows)
    assert packed.attention_mask is None and packed.position_ids is not None
    assert packed.input_ids[0].tolist() == [token for row in rows for token in samples[row][0]]
    assert packed.lengths == tuple(len(samples[row][0]) for row in rows) and padded.lengths is None
    assert packed.position_ids[0].tolist() == [
        place for row in rows for place in range(len(samples[row][0]))
    ]
    assert torch.equal(packed.labels, padded.labels) and torch.equal(
        packed.sample_of_token, padded.sample_of_token
    )
    for position, label in zip(packed.positions.tolist(), packed.labels.tolist(), strict=True):
        assert packed.input_ids[0, position + 1] == label
        assert (
            packed.position_ids[0, position + 1] == packed.position_ids[0, position] + 1
        )  # of the same sample


@given(SAMPLES, st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_parts_of_a_packed_row_together_are_the_row(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[tuple[list[int], int]],
    random: Random,
    parts: int,
) -> None:
    split = write_split(tmp_path_factory.mktemp("split"), samples)
    rows = random.sample(range(len(samples)), random.randint(0, len(samples)))
    row = collate(split, rows, packed=True)
    row = replace(row, teacher_outputs=torch.arange(len(row.labels))[:, None])
    shards = [row.sequence_shard(part, parts) for part in range(parts)]

    # Tokens: equal parts, and the end is filled with a sample of padding.
    assert row.lengths is not None
    tokens = torch.cat([shard.input_ids for shard in shards], 1)
    positions = torch.cat([shard.position_ids for shard in shards], 1)
    total, width = sum(row.lengths), shards[0].input_ids.shape[1]
    assert len({shard.input_ids.shape for shard in shards}) == 1 and width * parts - total < parts
    assert torch.equal(tokens[:, :total], row.input_ids)
    assert torch.equal(positions[:, :total], row.position_ids)
    for shard in shards:
        assert shard.lengths is not None and sum(shard.lengths) == width * parts
        assert shard.lengths[: len(row.lengths)] == row.lengths

    # Loss tokens: each in the part that has the hidden state that predicts it.
    for name in ("labels", "sample_of_token", "teacher_outputs"):
        assert torch.equal(torch.cat([getattr(s, name) for s in shards]), getattr(row, name))
    starts = [part * width for part in range(parts)]
    own = [shard.positions + start for shard, start in zip(shards, starts, strict=True)]
    assert torch.equal(torch.cat(own), row.positions)
    places = torch.arange(len(row.labels))
    for shard in shards:
        assert torch.equal(places[shard.loss_token_range], shard.teacher_outputs[:, 0])
        for place, value in zip(places[shard.loss_token_range], shard.token_positions, strict=True):
            of_sample = places[row.sample_of_token == row.sample_of_token[place]]
            expected = (place - of_sample[0]) / max(len(of_sample) - 1, 1)
            assert value == pytest.approx(float(expected))


def test_an_eos_that_is_the_padding_is_a_label(tmp_path: Path) -> None:
    """The EOS of these samples is id 0, which is also the padding: lengths tell them apart."""
    samples = [([5, *[6] * n, 0], 1) for n in range(1, 6)]
    batch = collate(write_split(tmp_path, samples), range(5))
    assert (batch.labels == 0).sum() == 5
    assert len(batch.labels) == sum(len(ids) - 1 for ids, _ in samples)
    assert batch.attention_mask.sum() == sum(len(ids) for ids, _ in samples)


def test_batch_without_rows_has_no_loss(tmp_path: Path) -> None:
    for packed in (False, True):
        batch = collate(write_split(tmp_path, [([1, 2], 1)]), [], packed=packed)
        assert batch.input_ids.tolist() == [[0]] and batch.rows == ()
        assert len(batch.positions) == len(batch.labels) == len(batch.sample_of_token) == 0
        assert batch.lengths == ((1,) if packed else None)
        assert batch.attention_mask is None if packed else batch.attention_mask.tolist() == [[1]]


def test_batch_is_copied_to_a_device(tmp_path: Path) -> None:
    on_device = collate(write_split(tmp_path, [([1, 2, 3], 1)]), [0]).to(torch.device("meta"))
    names = ("input_ids", "attention_mask", "positions", "labels", "sample_of_token")
    assert {getattr(on_device, name).device.type for name in names} == {"meta"}
    assert on_device.rows == (0,)
