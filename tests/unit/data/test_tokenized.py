"""Tokenized splits on disk: their files, and rows by id."""

from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.split_writer import in_chunks, save_split, write_tokenized_split
from pocl_ds.data.tokenized import SPLIT_FILES, TokenizedSplit
from pocl_ds.errors import ArtifactError

TOKENIZER = tiny_models.make_tokenizer()


def make_sample_tokenizer(tokenizer: Any = TOKENIZER, **options: Any) -> SampleTokenizer:
    return SampleTokenizer(
        tokenizer,
        PromptConfig(**{"template": "plain", "max_prompt_tokens": 16, "max_length": 32, **options}),
    )


def make_samples(count: int, *, words: int = 3) -> list[Sample]:
    return [
        Sample.from_instruction(f"s{n}", f"Say {n}.", f"answer {n} " * words, "x" * (n % 7))
        for n in range(count)
    ]


def test_split_on_disk_equals_its_samples(tmp_path: Path) -> None:
    samples = make_samples(1200)  # more than one chunk
    samples[700] = Sample.from_instruction("s700", "Say.", "word " * 50)
    sample_tokenizer = make_sample_tokenizer(overlong="drop", max_length=80)
    counts = write_tokenized_split(iter(samples), sample_tokenizer, tmp_path, "train")
    expected_samples = [sample for sample in samples if sample.id != "s700"]
    split = TokenizedSplit.open(tmp_path, "train")
    assert counts.samples == len(split) == 1199 and counts.dropped == 1 and counts.truncated == 0
    assert [name.decode() for name in split.ids] == [sample.id for sample in expected_samples]
    assert list(read_sample_file(tmp_path / "train.jsonl")) == expected_samples
    for row, sample in enumerate(expected_samples):
        expected = sample_tokenizer.tokenize(sample)
        assert split.tokens(row).tolist() == expected.ids
        assert split.prompt_tokens[row] == expected.prompt_tokens and split.total_tokens[
            row
        ] == len(expected.ids)
        assert split.loss_mask(row).tolist() == expected.loss_mask.tolist()
        assert split.loss_tokens[row] == expected.loss_mask.sum()
    assert counts.tokens == split.total_tokens.sum()
    assert counts.loss_tokens == split.loss_tokens.sum()
    assert split.tokens(0).dtype == np.uint32


def test_an_empty_split_can_be_written_and_opened(tmp_path: Path) -> None:
    counts = write_tokenized_split(iter(()), make_sample_tokenizer(), tmp_path, "test")
    split = TokenizedSplit.open(tmp_path, "test")
    assert counts.samples == len(split) == 0 and len(split.rows_of([])) == 0
    with pytest.raises(ArtifactError, match="sample x is not in"):
        split.rows_of(["x"])


@given(st.permutations(list(range(40))), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_rows_are_found_by_id(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], count: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    samples = make_samples(40)
    write_tokenized_split((samples[n] for n in order), make_sample_tokenizer(), folder, "train")
    split = TokenizedSplit.open(folder, "train")
    requested_ids = [f"s{n}" for n in range(count)]
    rows = split.rows_of(requested_ids)
    assert [split.ids[row].decode() for row in rows] == requested_ids
    assert (
        split.rows_of(
            np.array(requested_ids, "S20") if requested_ids else np.empty(0, "S1")
        ).tolist()
        == rows.tolist()
    )


def test_a_missing_id_is_named(tmp_path: Path) -> None:
    write_tokenized_split(iter(make_samples(3)), make_sample_tokenizer(), tmp_path, "train")
    split = TokenizedSplit.open(tmp_path, "train")
    for missing in ("unknown", "", "zzzz", "s1-longer-than-any"):
        with pytest.raises(ArtifactError, match=f"sample {missing} is not in"):
            split.rows_of(["s1", missing])


@pytest.mark.parametrize("part", SPLIT_FILES)
def test_a_missing_file_is_named(tmp_path: Path, part: str) -> None:
    write_tokenized_split(iter(make_samples(3)), make_sample_tokenizer(), tmp_path, "train")
    (tmp_path / f"train.{part}").unlink()
    with pytest.raises(ArtifactError, match=f"train.{part} is missing: run `pocl preprocess`"):
        TokenizedSplit.open(tmp_path, "train")


def test_ids_may_use_any_alphabet(tmp_path: Path) -> None:
    samples = [Sample.from_instruction(name, "Say.", "a") for name in ("é" * 64, "日本", "b", "-")]
    write_tokenized_split(iter(samples), make_sample_tokenizer(), tmp_path, "train")
    split = TokenizedSplit.open(tmp_path, "train")
    assert split.rows_of([sample.id for sample in samples]).tolist() == [0, 1, 2, 3]


@given(st.integers(0, 30), st.integers(1, 7))
def test_chunks_hold_every_item(count: int, size: int) -> None:
    samples = make_samples(count)
    lists = list(in_chunks(iter(samples), size))
    assert [sample for part in lists for sample in part] == samples
    assert all(len(part) == size for part in lists[:-1])


def test_tokenizing_streams_its_samples(tmp_path: Path) -> None:
    """5,000 samples of 16 kB are 80 MB of text, of which one chunk is in memory."""
    sample_tokenizer = make_sample_tokenizer()
    long = (
        Sample.from_instruction(f"s{n}", "Say.", "word", place=str(n) + "x" * 16_384)
        for n in range(5000)
    )
    tracemalloc.start()
    try:
        assert write_tokenized_split(long, sample_tokenizer, tmp_path, "train").samples == 5000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 8 << 20 < peak < 40 << 20  # 512 samples of 16 kB are 8 MB, and their lines as much


def test_find_disallowed_token(tmp_path: Path) -> None:
    save_split(tmp_path, "train", ["a", "b"], [[1, 9, 2, 3], [5, 2, 7]], [2, 1])
    split = TokenizedSplit.open(tmp_path, "train")
    allowed, all_ids = np.ones(10, bool), np.ones(10, bool)
    assert split.find_disallowed_token(allowed, prompts=all_ids) is None
    allowed[[2, 5, 9]] = False
    assert split.find_disallowed_token(allowed, prompts=allowed) == (0, 9)
    assert split.find_disallowed_token(allowed, prompts=all_ids) == (0, 2)  # 9 is in a prompt
    assert split.find_disallowed_token(allowed, prompts=all_ids, rows=np.array([1])) == (1, 2)
    allowed[2] = True
    assert (
        split.find_disallowed_token(allowed, prompts=all_ids) is None
    )  # 5 is the second sample's prompt
    assert split.find_disallowed_token(np.ones(8, bool), prompts=np.ones(8, bool)) == (
        0,
        9,
    )  # not an id of a teacher with 8 rows
    assert split.find_disallowed_token(
        np.ones(7, bool), prompts=np.ones(7, bool), rows=np.array([1])
    ) == (
        1,
        7,
    )


@pytest.mark.parametrize("part", SPLIT_FILES)
def test_full_disk_raises(part: str, tmp_path: Path) -> None:
    """`ndarray.tofile` misses a full disk, or raises an error without an errno."""
    (tmp_path / f"train.{part}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_tokenized_split(iter(make_samples(3)), make_sample_tokenizer(), tmp_path, "train")
    assert caught.value.errno == errno.ENOSPC


def test_truncated_token_file_is_damaged(tmp_path: Path) -> None:
    write_tokenized_split(iter(make_samples(3)), make_sample_tokenizer(), tmp_path, "train")
    complete = (tmp_path / "train.tokens.bin").read_bytes()
    (tmp_path / "train.tokens.bin").write_bytes(complete[:-8])
    tokens = len(complete) // 4
    with pytest.raises(
        ArtifactError, match=f"is damaged .{tokens - 2} tokens instead of {tokens}.: remove"
    ):
        TokenizedSplit.open(tmp_path, "train")
