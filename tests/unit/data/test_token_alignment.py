"""Tokens of two tokenizers that stand for the same bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_ds.config import PromptConfig
from pocl_ds.data.batches import collate
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.generated import GeneratedBatch, runs_of
from pocl_ds.data.retokenize import TeacherRetokenizer
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.split_writer import write_tokenized_split
from pocl_ds.data.token_alignment import common_spans, token_bytes
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ModelError

BYTE_LEVEL, SENTENCE_PIECE = (
    tiny_models.make_tokenizer(chat=True),
    tiny_models.make_sentencepiece_tokenizer(),
)
TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)


@settings(deadline=None)
@given(TEXTS)
def test_token_bytes_join_to_the_text(text: str) -> None:
    for tokenizer, space in ((BYTE_LEVEL, ""), (SENTENCE_PIECE, " ")):
        pieces = cached_token_bytes(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(pieces[token] for token in ids).decode() == (space + text if text else "")


TOKEN_BYTES: dict[int, list[bytes]] = {}


def cached_token_bytes(tokenizer: Any) -> list[bytes]:
    return TOKEN_BYTES.setdefault(id(tokenizer), token_bytes(tokenizer))


def cut(text: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % max(len(text), 1) for place in places}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges) if b > a]


@given(st.binary(max_size=20), st.lists(st.integers(0, 99)), st.lists(st.integers(0, 99)))
def test_spans_are_minimal_and_hold_equal_text(
    text: bytes, first_cuts: list[int], second_cuts: list[int]
) -> None:
    first_pieces, second_pieces = cut(text, first_cuts), cut(text, second_cuts)
    first_spans, second_spans = common_spans(first_pieces, second_pieces)
    assert set(first_spans) == set(second_spans) == set(range(len(set(first_spans))))
    for span in set(first_spans):
        first_span, second_span = (
            [piece for piece, number in zip(pieces, spans, strict=True) if number == span]
            for pieces, spans in ((first_pieces, first_spans), (second_pieces, second_spans))
        )
        assert b"".join(first_span) == b"".join(second_span)
        ends = [
            np.cumsum([len(piece) for piece in part])[:-1] for part in (first_span, second_span)
        ]
        assert not np.intersect1d(*ends).size


def test_differing_text_has_no_span() -> None:
    assert [side.tolist() for side in common_spans([b"ab", b"c", b"d"], [b" a", b"bc", b"x"])] == [
        [0, 0, -1],
        [0, 0, -1],
    ]
    assert [side.tolist() for side in common_spans([b"ab", b"cd"], [b"ab", b"c"])] == [
        [0, -1],
        [0, -1],
    ]
    assert [side.tolist() for side in common_spans([], [b"x"])] == [[], [-1]]


def test_other_kinds_of_tokenizers_are_refused() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(
        ModelError, match="neither byte-level BPE nor SentencePiece.*policy.name=seqkd"
    ):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))


SAMPLES = [
    Sample.from_instruction(f"s{i}", f"Explain {i}.", text)
    for i, text in enumerate(["the quick brown fox", "Sum of 你好 and é!", "x", "steps " * 30])
]


@pytest.fixture
def split(tmp_path: Path) -> TokenizedSplit:
    write_tokenized_split(iter(SAMPLES), SampleTokenizer(BYTE_LEVEL, PROMPT), tmp_path, "train")
    (tmp_path / "teacher").mkdir()
    write_tokenized_split(
        iter(SAMPLES),
        SampleTokenizer(SENTENCE_PIECE, PROMPT),
        tmp_path / "teacher",
        "train",
        texts=False,
    )
    assert not (tmp_path / "teacher" / "train.jsonl").exists()
    return TokenizedSplit.open(tmp_path, "train")


ENDS = {
    "student_end_ids": [BYTE_LEVEL.eos_token_id],
    "teacher_end_ids": [SENTENCE_PIECE.eos_token_id],
}
PROMPT = PromptConfig(template="chat", max_prompt_tokens=64, max_length=128)


@pytest.mark.parametrize("packed", [False, True])
def test_teacher_view_equals_the_teachers_tokenization(
    split: TokenizedSplit, tmp_path: Path, packed: bool
) -> None:
    teacher_split = TokenizedSplit.open(tmp_path / "teacher", "train")
    retokenizer = TeacherRetokenizer(
        BYTE_LEVEL, SENTENCE_PIECE, {"train": teacher_split}, max_length=None, packed=packed, **ENDS
    )
    rows = [2, 0, 1]
    batch = retokenizer(split, collate(split, rows, packed=packed))
    assert batch.teacher_view is not None
    teacher_batch, expected = (
        batch.teacher_view.batch,
        collate(teacher_split, rows, packed=packed),
    )
    assert (
        teacher_batch.input_ids.tolist() == expected.input_ids.tolist()
        and teacher_batch.labels.tolist() == expected.labels.tolist()
    )
    student_spans, teacher_spans = (
        batch.teacher_view.student_spans,
        batch.teacher_view.teacher_spans,
    )
    assert len(student_spans) == len(batch.labels) and len(teacher_spans) == len(
        teacher_batch.labels
    )
    assert (
        set(student_spans.tolist())
        == set(teacher_spans.tolist())
        == set(range(batch.teacher_view.num_spans))
    )
    student_bytes, teacher_bytes = (
        cached_token_bytes(BYTE_LEVEL),
        cached_token_bytes(SENTENCE_PIECE),
    )
    for span in range(batch.teacher_view.num_spans):
        student_tokens, teacher_tokens = (
            batch.labels[student_spans == span].tolist(),
            teacher_batch.labels[teacher_spans == span].tolist(),
        )
        texts = (
            b"".join(student_bytes[token] for token in student_tokens),
            b"".join(teacher_bytes[token] for token in teacher_tokens),
        )
        is_eos = (student_tokens, teacher_tokens) == (
            [BYTE_LEVEL.eos_token_id],
            [SENTENCE_PIECE.eos_token_id],
        )
        assert is_eos or texts[0].strip() == texts[1].strip()
    copy = batch.to(batch.labels.device).teacher_view
    assert copy is not None and copy.num_spans == batch.teacher_view.num_spans


def test_tokens_beyond_the_teachers_limit_have_no_span(
    split: TokenizedSplit, tmp_path: Path
) -> None:
    teacher_split = TokenizedSplit.open(tmp_path / "teacher", "train")
    longest = int(teacher_split.prompt_tokens[3]) + 10
    retokenizer = TeacherRetokenizer(
        BYTE_LEVEL,
        SENTENCE_PIECE,
        {"train": teacher_split},
        max_length=longest,
        packed=False,
        **ENDS,
    )
    batch = retokenizer(split, collate(split, [3]))
    assert batch.teacher_view is not None
    student_spans, teacher_spans = (
        batch.teacher_view.student_spans,
        batch.teacher_view.teacher_spans,
    )
    assert len(teacher_spans) == 10 and set(student_spans[student_spans >= 0].tolist()) == set(
        teacher_spans[teacher_spans >= 0].tolist()
    )
    assert (student_spans == -1).any()


def test_generated_responses_and_empty_batches_are_retokenized(
    split: TokenizedSplit, tmp_path: Path
) -> None:
    teacher_split = TokenizedSplit.open(tmp_path / "teacher", "train")
    retokenizer = TeacherRetokenizer(
        BYTE_LEVEL, SENTENCE_PIECE, {"train": teacher_split}, max_length=None, packed=False, **ENDS
    )
    # The response ends within a character.
    partial = BYTE_LEVEL("a你", add_special_tokens=False)["input_ids"][:-1]
    generated = GeneratedBatch.from_responses(
        split, np.array([1]), [partial], end_of_turn_id=0, max_length=99, allowed=np.ones(400, bool)
    )
    batch = retokenizer(generated, collate(generated, [0]))
    assert batch.teacher_view is not None
    size = int(teacher_split.prompt_tokens[1])
    assert (
        batch.teacher_view.batch.input_ids[0, :size].tolist()
        == teacher_split.tokens(1)[:size].tolist()
    )
    assert (
        batch.teacher_view.student_spans.tolist() == [0, -1, -1]
        and batch.teacher_view.teacher_spans[0] == 0
    )
    empty = retokenizer(split, collate(split, []))
    assert (
        empty.teacher_view is not None
        and not len(empty.teacher_view.batch.labels)
        and empty.teacher_view.num_spans == 0
    )


def test_first_token_after_an_empty_prompt_has_no_span(split: TokenizedSplit) -> None:
    ids = BYTE_LEVEL("the quick", add_special_tokens=False)["input_ids"]
    texts = [np.array([*ids, 0], np.uint32)]
    generated = GeneratedBatch(np.array([0]), np.array([b"s0"]), np.array([0]), texts)
    prompts: Any = {
        "train": SimpleNamespace(
            tokens=lambda row: np.empty(0, np.uint32),
            prompt_tokens=[0],
            loss_mask=lambda row: np.empty(0, np.bool_),
        )
    }
    batch = TeacherRetokenizer(
        BYTE_LEVEL, SENTENCE_PIECE, prompts, max_length=None, packed=False, **ENDS
    )(generated, collate(generated, [0]))
    assert batch.teacher_view is not None
    student_spans, teacher_spans = (
        batch.teacher_view.student_spans,
        batch.teacher_view.teacher_spans,
    )
    assert len(student_spans) == len(batch.labels) == len(ids) and len(teacher_spans) == len(
        batch.teacher_view.batch.labels
    )
    assert 0 not in student_spans.tolist() and set(
        student_spans[student_spans >= 0].tolist()
    ) == set(teacher_spans[teacher_spans >= 0].tolist())


def test_earlier_turns_pair_with_the_teachers(tmp_path: Path) -> None:
    """Every turn that trains has spans, also where one side lost its earliest turns."""
    turns = [
        Message(role, text)
        for number in range(3)
        for role, text in (("user", f"Question {number}?"), ("assistant", f"the fox {number}"))
    ]
    sample = Sample("s", tuple(turns))
    (tmp_path / "teacher").mkdir()
    teacher_prompt = PROMPT.model_copy(update={"max_prompt_tokens": 60})
    for tokenizer, prompt, folder in (
        (BYTE_LEVEL, PROMPT.model_copy(update={"max_prompt_tokens": 100}), tmp_path),
        (SENTENCE_PIECE, teacher_prompt, tmp_path / "teacher"),
    ):
        samples = SampleTokenizer(tokenizer, prompt, keep_all=True)
        write_tokenized_split([sample], samples, folder, "train")
    split = TokenizedSplit.open(tmp_path, "train")
    own = TokenizedSplit.open(tmp_path / "teacher", "train")
    assert len(runs_of(split.loss_mask(0))) == 3 and len(runs_of(own.loss_mask(0))) == 2
    retokenizer = TeacherRetokenizer(
        BYTE_LEVEL, SENTENCE_PIECE, {"train": own}, max_length=None, packed=False, **ENDS
    )
    batch = retokenizer(split, collate(split, [0]))
    view = batch.teacher_view
    assert view is not None
    texts = {
        span: b"".join(
            cached_token_bytes(BYTE_LEVEL)[token]
            for token in batch.labels[view.student_spans == span].tolist()
        )
        for span in sorted(set(view.student_spans.tolist()) - {-1})
    }
    assert b"".join(texts.values()) == b"the fox 1the fox 2<|endoftext|>"
    unpaired = batch.labels[view.student_spans == -1].tolist()
    assert BYTE_LEVEL.decode(unpaired) == "the fox 0"
    paired = view.student_spans[view.student_spans >= 0].tolist()
    assert paired == sorted(paired)
    assert set(paired) == set(view.teacher_spans.tolist()) - {-1}
