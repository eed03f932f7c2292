"""Tokenized splits: equal prompts everywhere, a counted EOS, truncation, rows by id."""

from __future__ import annotations

import errno
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.tokenized import SampleTokenizer, TokenizedSplit, in_chunks, write_tokenized_split
from pocl_ds.errors import ArtifactError, DataError, ModelError

TOKENIZER = tiny_models.make_tokenizer()
TOKENIZER_PAD_EOS = tiny_models.make_tokenizer()
TOKENIZER_PAD_EOS.pad_token = TOKENIZER_PAD_EOS.eos_token
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60)


def make_sample_tokenizer(tokenizer: Any = TOKENIZER, **options: Any) -> SampleTokenizer:
    return SampleTokenizer(
        tokenizer,
        PromptConfig(**{"template": "plain", "max_prompt_tokens": 16, "max_length": 32, **options}),
    )


def make_samples(count: int, *, words: int = 3) -> list[Sample]:
    return [
        Sample(f"s{n}", f"Say {n}.", "x" * (n % 7), (f"answer {n} " * words,)) for n in range(count)
    ]


@given(TEXT, TEXT, st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_sample_is_prompt_response_and_eos(
    instruction: str, answer: str, prompt_limit: int, response_limit: int, pad_is_eos: bool
) -> None:
    tokenizer = TOKENIZER_PAD_EOS if pad_is_eos else TOKENIZER
    sample_tokenizer = make_sample_tokenizer(
        tokenizer, max_prompt_tokens=prompt_limit, max_length=prompt_limit + response_limit
    )
    sample = Sample("s", instruction, "", (answer, "another reference"))
    encoded = sample_tokenizer.tokenize(sample)
    prompt = tokenizer(instruction)["input_ids"]
    response = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert (
        sample_tokenizer.tokenize_prompt(sample)
        == prompt[:prompt_limit]
        == encoded.ids[: encoded.prompt_tokens]
    )
    assert encoded.prompt_tokens == min(len(prompt), prompt_limit)
    complete = [*prompt[:prompt_limit], *response, tokenizer.eos_token_id]
    assert encoded.ids == complete[: prompt_limit + response_limit]
    assert encoded.truncated == (
        len(prompt) > prompt_limit or len(complete) > prompt_limit + response_limit
    )
    assert sample_tokenizer.tokenize_many([sample]) == [encoded]


def test_max_length_is_inclusive() -> None:
    fits = Sample("s", "a" * 16, "", ("b" * 15,))  # bytes without merges: 16 + 15 + EOS = 32
    one_more = Sample("s", "a" * 16, "", ("b" * 16,))
    sample_tokenizer = make_sample_tokenizer()
    assert (
        len(sample_tokenizer.tokenize(fits).ids) == 32
        and not sample_tokenizer.tokenize(fits).truncated
    )
    assert sample_tokenizer.tokenize(fits).ids[-1] == TOKENIZER.eos_token_id
    cut = sample_tokenizer.tokenize(one_more)
    assert len(cut.ids) == 32 and cut.truncated and cut.ids[-1] != TOKENIZER.eos_token_id


@pytest.mark.parametrize(
    "sample", [Sample("long-one", "a" * 17, "", ("b",)), Sample("long-one", "a", "", ("b" * 40,))]
)
def test_overlong_samples_are_truncated_dropped_or_refused(sample: Sample) -> None:
    assert make_sample_tokenizer().tokenize_many([sample])[0] is not None
    assert make_sample_tokenizer(overlong="drop").tokenize_many([sample]) == [None]
    with pytest.raises(
        DataError,
        match=r"long-one has \d+ prompt tokens \(limit 16\) and \d+ in all \(limit 32\): raise",
    ):
        make_sample_tokenizer(overlong="error").tokenize_many([sample])


def test_prompts_are_truncated_and_counted_but_never_dropped() -> None:
    samples = [Sample(f"s{n}", "a" * n, "", ("b",)) for n in (16, 17, 20)]
    for overlong in ("truncate", "drop"):
        sample_tokenizer = make_sample_tokenizer(overlong=overlong)
        assert sample_tokenizer.tokenize_prompts(samples) == (
            [sample_tokenizer.tokenize_prompt(sample) for sample in samples],
            2,
        )
    with pytest.raises(
        DataError, match=r"s17 has 17 prompt tokens \(limit 16\): raise prompt\.max_prompt_tokens"
    ):
        make_sample_tokenizer(overlong="error").tokenize_prompts(samples)
    assert make_sample_tokenizer(overlong="error").tokenize_prompts(samples[:1])[1] == 0


def test_empty_prompt_is_refused(tmp_path: Path) -> None:
    """Scoring and generation start after a prompt, and engines refuse an empty one."""
    path = tmp_path / "input-only.jinja"
    path.write_text("{{ input }}")
    sample_tokenizer, sample = make_sample_tokenizer(template=str(path)), make_samples(1)[0]
    for encode in (
        sample_tokenizer.tokenize,
        sample_tokenizer.tokenize_prompt,
        lambda sample: sample_tokenizer.tokenize_many([sample]),
    ):
        with pytest.raises(
            DataError,
            match=r"sample s0: prompt\.template=.*only\.jinja gives an empty prompt: fix it",
        ):
            encode(sample)


def test_only_the_prompt_gets_the_tokenizers_bos() -> None:
    """One BOS before the prompt, none between prompt and response, and one EOS at the end."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny_models.PAD} $A {tiny_models.EOS}",
        special_tokens=[(tiny_models.EOS, 0), (tiny_models.PAD, 1)],
    )
    encoded = make_sample_tokenizer(tokenizer).tokenize(Sample("s", "ab", "", ("cd",)))
    bare = make_sample_tokenizer().tokenize(Sample("s", "ab", "", ("cd",)))
    assert encoded.ids == [1, *bare.ids] and encoded.ids.count(0) == encoded.ids.count(1) == 1


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token.*set eos_token"):
        make_sample_tokenizer(tokenizer)


def test_split_on_disk_equals_its_samples(tmp_path: Path) -> None:
    samples = make_samples(1200)  # more than one chunk
    samples[700] = Sample("s700", "Say.", "", ("word " * 50,))
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
    assert counts.tokens == split.total_tokens.sum()
    assert counts.response_tokens == (split.total_tokens - split.prompt_tokens).sum()
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


@pytest.mark.parametrize("part", ["ids.npy", "index.npy", "tokens.bin"])
def test_a_missing_file_is_named(tmp_path: Path, part: str) -> None:
    write_tokenized_split(iter(make_samples(3)), make_sample_tokenizer(), tmp_path, "train")
    (tmp_path / f"train.{part}").unlink()
    with pytest.raises(ArtifactError, match=f"train.{part} is missing: run `pocl preprocess`"):
        TokenizedSplit.open(tmp_path, "train")


def test_ids_may_use_any_alphabet(tmp_path: Path) -> None:
    samples = [Sample(name, "Say.", "", ("a",)) for name in ("é" * 64, "日本", "b", "-")]
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
    sample_tokenizer.template = _Instruction(sample_tokenizer.template)
    long = (
        Sample(f"s{n}", "Say.", "", ("word",), (("user", str(n) + "x" * 16_384),))
        for n in range(5000)
    )
    tracemalloc.start()
    try:
        assert write_tokenized_split(long, sample_tokenizer, tmp_path, "train").samples == 5000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 8 << 20 < peak < 24 << 20  # 512 samples of 16 kB are 8 MB


class _Instruction:
    """The template `plain`, which also accepts samples with history."""

    def __init__(self, template: Any) -> None:
        self.template = template

    def token_ids_batch(self, samples: Sequence[Sample]) -> list[list[int]]:
        return self.template.token_ids_batch(
            [Sample(sample.id, sample.instruction, "", sample.references) for sample in samples]
        )


def test_find_disallowed_token(tmp_path: Path) -> None:
    np.save(tmp_path / "train.index.npy", np.array([(0, 2, 4), (4, 1, 3)], np.int64))
    np.save(tmp_path / "train.ids.npy", np.array([b"a", b"b"], "S8"))
    np.array([1, 9, 2, 3, 5, 2, 7], np.uint32).tofile(tmp_path / "train.tokens.bin")
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


def test_truncated_reference_gets_no_eos() -> None:
    sample_tokenizer = SampleTokenizer(tiny_models.make_tokenizer(), PromptConfig(template="plain"))
    complete = sample_tokenizer.tokenize(Sample("a", "Say it.", "", ("It is",)))
    truncated = sample_tokenizer.tokenize(Sample("a", "Say it.", "", ("It is",), ended=False))
    assert [*truncated.ids, 0] == complete.ids and truncated.prompt_tokens == complete.prompt_tokens
    assert sample_tokenizer.tokenize(Sample("a", "Say it.", "", ("",), ended=False)).ids[-1] == 0, (
        "a sample needs a loss token"
    )


@pytest.mark.parametrize("part", ["tokens.bin", "index.npy", "ids.npy"])
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
