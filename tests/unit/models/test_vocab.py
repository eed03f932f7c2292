"""Vocabulary alignment, also of real tokenizers if they are available."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pocl_ds.config import ModelSource
from pocl_ds.errors import ModelError
from pocl_ds.models import load as model_loading
from pocl_ds.models import vocab
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import (
    VocabMap,
    VocabularyAlignment,
    _token_counts,
    align_teacher_vocabularies,
    align_vocabularies,
    separate_vocabularies,
)


class Table:
    """The part of a tokenizer that `align_vocabularies` uses: a table, an EOS, and one id
    per character.
    """

    def __init__(self, vocabulary: dict[str, int], eos: str | None = None) -> None:
        self.vocabulary = vocabulary
        self.eos_token = eos or next(iter(vocabulary))
        self.eos_token_id = vocabulary[self.eos_token]

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.vocabulary[character] for character in text if character in self.vocabulary]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        tokens = {index: token for token, index in self.vocabulary.items()}
        return [tokens[index] for index in ids]


def numbered(count: int, prefix: str = "t") -> dict[str, int]:
    return {f"{prefix}{index}": index for index in range(count)}


def load_real_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    eos = "<|endoftext|>" if "gpt2" in folder.name else "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def test_equal_tokenizers_and_rows_share_all_ids() -> None:
    tokenizer = tiny_models.make_tokenizer()
    alignment = align_vocabularies(
        tokenizer, tiny_models.make_tokenizer(), len(tokenizer), len(tokenizer)
    )
    assert (alignment.size, alignment.shared) == (len(tokenizer), None)


def test_padded_rows_are_masked_on_both_sides() -> None:
    """As in Qwen2.5: 151,665 tokens, 152,064 rows and 151,936 rows."""
    alignment = align_vocabularies(
        Table(numbered(151_665)), Table(numbered(151_665)), 152_064, 151_936
    )
    assert alignment.size == 151_936
    assert alignment.shared is not None
    assert alignment.shared.sum() == 151_665
    assert alignment.shared[:151_665].all()
    assert alignment.report.startswith(
        "vocabulary: 151665 ids shared (teacher 152064 rows, student 151936), 271 without a token "
        "on"
    )


def test_an_id_that_one_side_lacks_is_masked() -> None:
    teacher = numbered(10)
    student = {token: index for token, index in numbered(10).items() if index != 4}
    alignment = align_vocabularies(Table(teacher), Table(student), 10, 10)
    assert alignment.shared is not None
    assert np.flatnonzero(~alignment.shared).tolist() == [4]


def test_tokens_are_counted_by_name_and_rows_by_id() -> None:
    """A token with another id is common; a token with an id beyond the rows fills no row."""
    teacher = {"a": 0, "b": 1, "c": 2, "only": 7}
    student = {"b": 0, "c": 3, "mine": 1, "too": 2, "far": 20}
    assert _token_counts(teacher, student, 9, 6) == (
        ": 2 tokens common, 2 only the teacher's, 3 only the student's; rows without a token 5 "
        "and 2"
    )


def test_report_of_equal_tokenizers_has_only_counts() -> None:
    teacher, student = (Table(numbered(1001), "t1000") for _ in range(2))
    assert align_vocabularies(teacher, student, 1001, 1001).report == (
        "vocabulary: 1001 ids shared (teacher 1001 rows, student 1001): 1001 tokens common, 0 "
        "only the teacher's, 0 only the "
        "student's; rows without a token 0 and 0"
    )


@given(
    st.sets(st.integers(0, 30), min_size=1),
    st.sets(st.integers(0, 30), min_size=1),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_shared_is_exactly_the_common_ids(
    teacher_ids: set[int], student_ids: set[int], teacher_rows: int, student_rows: int
) -> None:
    teacher, student = (
        Table({f"t{index}": index for index in sorted(ids)}) for ids in (teacher_ids, student_ids)
    )
    alignment = align_vocabularies(teacher, student, teacher_rows, student_rows)
    assert alignment.size == min(teacher_rows, student_rows)
    shared = (
        set(range(alignment.size))
        if alignment.shared is None
        else set(np.flatnonzero(alignment.shared))
    )
    assert shared == {index for index in teacher_ids & student_ids if index < alignment.size}


def test_different_tokenizers_are_refused() -> None:
    with pytest.raises(
        ModelError,
        match=r"different tokenizers: 0 of 20 and 30 tokens are common, and id 0 is 't0'",
    ):
        align_vocabularies(Table(numbered(20)), Table(numbered(30, "u")), 20, 30)


def test_same_tokens_under_other_ids_are_mapped() -> None:
    shifted = {token: index + 1 for token, index in numbered(50).items()}
    alignment = align_vocabularies(Table(numbered(50)), Table(shifted), 50, 53)
    assert alignment.shared is not None and alignment.teacher_ids is not None
    assert np.flatnonzero(~alignment.shared).tolist() == [0, 51, 52]
    assert alignment.teacher_ids[1:51].tolist() == list(range(50))
    assert "50 tokens shared under other ids, mapped" in alignment.report


def test_teacher_id_is_used_once() -> None:
    """The student's EOS maps to the teacher's. The student's token of the same name must not map to
    it again, since its probability would count twice.
    """
    teacher = {**numbered(49), "<end>": 49}
    student = {
        **{token: index + 1 for token, index in numbered(49).items()},
        "</s>": 0,
        "<end>": 50,
    }
    alignment = align_vocabularies(Table(teacher, "<end>"), Table(student, "</s>"), 50, 51)
    assert alignment.shared is not None and alignment.teacher_ids is not None
    assert (alignment.teacher_ids[0], alignment.shared[0], alignment.shared[50]) == (
        49,
        True,
        False,
    )
    assert sorted(alignment.teacher_ids[alignment.shared]) == list(range(50))


def test_the_first_pair_of_a_token_counts() -> None:
    """The student's EOS stays with the teacher's EOS, id 0, although the teacher also has a token
    of its name.
    """
    teacher = {"<end>": 0, "</s>": 50, **{f"t{index}": index for index in range(1, 50)}}
    student = {**{f"t{index}": index - 1 for index in range(1, 50)}, "</s>": 49}
    alignment = align_vocabularies(Table(teacher, "<end>"), Table(student, "</s>"), 51, 50)
    assert alignment.teacher_ids is not None
    assert alignment.teacher_ids.tolist() == [*range(1, 50), 0]


def test_a_token_beyond_the_students_rows_is_not_mapped() -> None:
    student = {token: index + 1 for token, index in numbered(50).items()}
    alignment = align_vocabularies(Table(numbered(50)), Table(student), 50, 50)
    assert alignment.teacher_ids is not None
    assert alignment.teacher_ids[1:].tolist() == list(range(49))


def test_special_token_of_one_side_only_is_not_mapped() -> None:
    teacher, student = (
        Table(numbered(50)),
        Table({token: index + 1 for token, index in numbered(50).items()}),
    )
    for side, token in ((teacher, "t7"), (student, "t8")):
        plain = align_vocabularies(teacher, student, 50, 51).teacher_ids
        side.bos_token = token  # type: ignore[attr-defined]
        alignment = align_vocabularies(teacher, student, 50, 51).teacher_ids
        del side.bos_token  # type: ignore[attr-defined]
        assert (
            alignment is not None
            and plain is not None
            and alignment.tolist() == plain.tolist() == [0, *range(50)]
        )


def test_each_side_uses_its_own_revision_and_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text decoder of a multimodal model."""
    calls = []

    def load(path: str, **options: Any) -> Any:
        calls.append((path, options))
        rows = {"a": 7, "b": 4}[path]
        return SimpleNamespace(
            get_text_config=lambda decoder: SimpleNamespace(vocab_size=rows if decoder else 1)
        )

    monkeypatch.setattr(model_loading, "load_model_config", load)
    monkeypatch.setattr(
        model_loading,
        "load_tokenizer",
        lambda path, **options: load(path, **options) and Table(numbered(6)),
    )
    teacher, student = (
        ModelSource(model="m", revision="r", trust_remote_code=True),
        ModelSource(model="n"),
    )
    assert vocab.align_model_vocabularies(teacher, "a", student, "b").size == 4
    separate = separate_vocabularies([(teacher, "a")], student, "b")
    teacher_call, student_call = (
        ("a", {"revision": "r", "trust_remote_code": True}),
        ("b", {"revision": None, "trust_remote_code": False}),
    )
    assert calls == [teacher_call, student_call] * 4
    assert (separate.size, separate.shared, separate.teacher_ids) == (
        4,
        None,
        None,
    )  # the last two of 6 tokens are beyond the rows
    masked = VocabMap.from_alignment(separate).teacher_masked
    assert masked is not None and masked.tolist() == [False] * 6 + [True]


def test_several_teachers_share_their_common_ids(tmp_path: Path) -> None:
    small, padded = (
        tiny_models.llama(tmp_path / "a"),
        tiny_models.llama(tmp_path / "b", rows=tiny_models.VOCABULARY + 8),
    )
    other = tiny_models.llama(tmp_path / "c", tokenizer=tiny_models.make_sentencepiece_tokenizer())
    source = ModelSource(model="m")
    alignment = align_teacher_vocabularies(
        [(source, str(padded)), (source, str(small))], source, str(padded)
    )
    assert (alignment.size, alignment.shared) == (tiny_models.VOCABULARY, None)
    with pytest.raises(ModelError, match="different tokenizers"):
        align_teacher_vocabularies([(source, str(small)), (source, str(other))], source, str(small))
    separate = separate_vocabularies([(source, str(padded))], source, str(small))
    assert (
        separate.teacher_tokens is not None
        and separate.teacher_tokens.sum() == tiny_models.VOCABULARY
        and separate.shared is None
    )
    assert (
        "320 tokens common, 0 only the teacher's, 0 only the student's; rows without a token 8 "
        "and 0" in separate.report
    )


def test_teachers_with_other_ids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {"a": None, "b": np.array([1, 0, 2])}
    monkeypatch.setattr(
        vocab,
        "align_model_vocabularies",
        lambda source, path, *_: VocabularyAlignment(3, None, "", maps[path]),
    )
    source = ModelSource(model="m")
    with pytest.raises(ModelError, match="the teachers a and b have other ids for the same tokens"):
        align_teacher_vocabularies([(source, "a"), (source, "b")], source, "s")
    assert (
        align_teacher_vocabularies([(source, "b"), (source, "b")], source, "s").teacher_ids
        is not None
    )


def test_ids_that_any_teacher_lacks_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    alignments = {
        "a": VocabularyAlignment(
            4, np.array([True, False, True, True]), "one", np.array([2, 0, 1, 3])
        ),
        "b": VocabularyAlignment(3, np.array([True, True, False]), "two", np.array([2, 5, 0])),
        "c": VocabularyAlignment(4, None, "one", np.array([2, 6, 4, 3])),
    }
    monkeypatch.setattr(
        vocab, "align_model_vocabularies", lambda source, path, *_: alignments[path]
    )
    source = ModelSource(model="m")
    alignment = align_teacher_vocabularies([(source, name) for name in alignments], source, "s")
    assert alignment.shared is not None and alignment.teacher_ids is not None
    assert (alignment.size, alignment.report, alignment.shared.tolist()) == (
        3,
        "one; two",
        [True, False, False],
    )
    assert alignment.teacher_ids.tolist() == [
        2,
        0,
        1,
    ]  # the first teacher's; the others differ only at masked ids


def test_vocab_map_reorders_the_teachers_logits() -> None:
    ids = VocabMap.from_alignment(
        VocabularyAlignment(4, np.array([True, True, False, True]), "", np.array([2, 0, 0, 4]))
    )
    head = OutputHead(nn.Parameter(torch.eye(5)), None, 1.0, None)
    logits = ids.teacher_logits(head, torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0]]))
    assert logits.tolist() == [[12.0, 10.0, -math.inf, 14.0]]
    assert ids.teacher_inputs(torch.tensor([[3, 0, 1]])).tolist() == [[4, 2, 0]]
    assert VocabMap(4).teacher_logits(head, torch.eye(5)[:1]).tolist() == [
        [1.0, 0.0, 0.0, 0.0]
    ]  # the head may have more rows
    assert ids.student_logits(head, torch.eye(5)[:1]).tolist() == [[1.0, 0.0, -math.inf, 0.0]]
    # A prompt of the teacher may hold masked ids, unless ids are mapped.
    assert ids.teacher_readable.tolist() == [True, True, False, True]
    assert VocabMap(3, ids.masked).teacher_readable.tolist() == [True] * 3


def test_vocab_map_holds_the_alignment_as_tensors() -> None:
    shared, teacher_tokens = np.array([True, False, True]), np.array([False, True])
    ids = VocabMap.from_alignment(
        VocabularyAlignment(3, shared, "", np.array([1, 0, 0]), teacher_tokens)
    )
    assert (ids.size, ids.allowed.tolist()) == (3, shared.tolist())
    assert ids.teacher_masked is not None and ids.teacher_masked.tolist() == [True, False]
    on_device = ids.to(torch.device("meta"))
    tensors = (on_device.masked, on_device.teacher_ids, on_device.teacher_masked)
    assert on_device.size == 3 and [
        tensor.shape for tensor in tensors if tensor is not None and tensor.is_meta
    ] == [(3,), (3,), (2,)]
    plain, logits = VocabMap.from_alignment(VocabularyAlignment(3, None, "")), torch.ones(1, 3)
    assert plain == VocabMap(3) == plain.to(torch.device("meta"))
    assert plain.allowed.tolist() == [True] * 3 and plain.mask(logits) is logits


def test_report_notes_differences() -> None:
    report = align_vocabularies(Table(numbered(9), "t1"), Table(numbered(9), "t2"), 9, 7).report
    assert "the EOS is 't2' for the student, 't1' for the teacher" in report
    assert "ids up to 8, beyond its 7 rows" in report
    other = {**numbered(3), "a": 3}
    assert (
        "split text differently"
        in align_vocabularies(Table(numbered(3)), Table(other), 9, 9).report
    )


def test_real_gpt2_and_opt_share_tokens_but_not_ids(shared_data: Path) -> None:
    gpt2, opt = (
        load_real_tokenizer(shared_data / "tokenizers" / "gpt2"),
        load_real_tokenizer(shared_data / "tokenizers" / "opt"),
    )
    assert align_vocabularies(gpt2, gpt2, 50_257, 50_257).shared is None
    padded = align_vocabularies(opt, opt, 50_272, 50_272)
    assert padded.shared is not None
    assert padded.shared.sum() == 50_265
    pair = align_vocabularies(gpt2, opt, 50_257, 50_272)
    assert pair.shared is not None and pair.teacher_ids is not None
    text = "It's 2,024 items: return x**2  # na\u00efve caf\u00e9"
    student_tokens, teacher_tokens = (
        side.encode(text, add_special_tokens=False) for side in (opt, gpt2)
    )
    assert (
        pair.teacher_ids[student_tokens].tolist() == teacher_tokens
        and pair.shared[student_tokens].all()
    )
    assert pair.teacher_ids[opt.eos_token_id] == gpt2.eos_token_id and pair.shared[opt.eos_token_id]
    assert pair.shared.sum() > 50_257 - 10


def test_real_qwen_and_gpt2_are_refused(shared_data: Path) -> None:
    lines = (shared_data / "tokenizers" / "qwen" / "qwen.tiktoken").read_text().splitlines()
    qwen = Table({token: int(rank) for token, rank in (line.split() for line in lines)})
    assert len(qwen.get_vocab()) == 151_643
    pair = align_vocabularies(qwen, qwen, 152_064, 151_936)
    assert pair.shared is not None
    assert (pair.size, int(pair.shared.sum())) == (151_936, 151_643)
    with pytest.raises(ModelError, match=r"different tokenizers"):
        align_vocabularies(
            qwen, load_real_tokenizer(shared_data / "tokenizers" / "gpt2"), 152_064, 50_257
        )
