"""A teacher with its own prompts reads the student's responses, label by label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from pocl_ds.config import PromptConfig
from pocl_ds.data.batches import collate
from pocl_ds.data.conversation import Sample
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.split_writer import write_tokenized_split
from pocl_ds.data.teacher_prompts import TeacherPrompts, compare_prompts
from pocl_ds.data.tokenized import TokenizedSplit

CHAT = PromptConfig(template="chat", max_prompt_tokens=64, max_length=128)
OTHER_TEMPLATE = (
    "Teacher:{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
    "{% else %}!{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
)
SAMPLES = [Sample.from_instruction(f"s{i}", f"Explain {i}.", "It is " * i) for i in range(1, 4)]


def with_template(template: str) -> Any:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def splits(tmp_path: Path) -> tuple[TokenizedSplit, TokenizedSplit]:
    (tmp_path / "teacher").mkdir()
    for template, folder in (
        (tiny_models.CHAT_TEMPLATE, tmp_path),
        (OTHER_TEMPLATE, tmp_path / "teacher"),
    ):
        tokenizer = SampleTokenizer(with_template(template), CHAT)
        write_tokenized_split(SAMPLES, tokenizer, folder, "train")
    return TokenizedSplit.open(tmp_path, "train"), TokenizedSplit.open(
        tmp_path / "teacher", "train"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_the_teacher_reads_its_prompt_and_the_students_response(
    splits: tuple[TokenizedSplit, TokenizedSplit], packed: bool
) -> None:
    split, own = splits
    reader = TeacherPrompts({"train": own}, lambda ids: ids + 1000, packed=packed)
    batch = reader(split, collate(split, [2, 0], packed=packed))
    assert batch.teacher_batch is not None
    assert batch.teacher_batch.labels.tolist() == (batch.labels + 1000).tolist()
    assert batch.teacher_batch.sample_of_token.tolist() == batch.sample_of_token.tolist()
    prompt = own.tokens(2)[: int(own.prompt_tokens[2])].tolist()
    assert batch.teacher_batch.input_ids[0, : len(prompt)].tolist() == prompt
    moved = batch.to(torch.device("meta"))
    assert moved.teacher_batch is not None and moved.teacher_batch.labels.is_meta


def test_generated_responses_and_empty_batches(
    splits: tuple[TokenizedSplit, TokenizedSplit],
) -> None:
    split, own = splits
    reader = TeacherPrompts({"train": own}, lambda ids: ids, packed=False)
    generated = GeneratedBatch.from_responses(
        split,
        np.array([1]),
        [[5, 6, 0]],
        end_of_turn_id=0,
        max_length=99,
        allowed=np.ones(400, bool),
    )
    batch = reader(generated, collate(generated, [0]))
    assert batch.teacher_batch is not None
    assert batch.teacher_batch.labels.tolist() == [5, 6, 0] == batch.labels.tolist()
    prompt = own.tokens(1)[: int(own.prompt_tokens[1])].tolist()
    assert batch.teacher_batch.input_ids[0].tolist() == [*prompt, 5, 6, 0]
    empty = reader(split, collate(split, []))
    assert empty.teacher_batch is not None and not len(empty.teacher_batch.labels)


def test_prompts_are_compared_by_template_and_bos() -> None:
    student = SampleTokenizer(with_template(tiny_models.CHAT_TEMPLATE), CHAT)
    assert compare_prompts(student, student) == ""
    other = SampleTokenizer(with_template(OTHER_TEMPLATE), CHAT)
    assert "the teacher's own is 'Teacher:[QUESTION]!'" in compare_prompts(student, other)
    from tokenizers import processors

    tokenizer = tiny_models.make_sentencepiece_tokenizer()
    plain = PromptConfig(template="plain")
    without = SampleTokenizer(tiny_models.make_sentencepiece_tokenizer(), plain)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    with_bos = SampleTokenizer(tokenizer, plain)
    assert compare_prompts(without, with_bos) == (
        "the teacher's tokenizer begins a prompt with BOS, and the student's does not"
    )
