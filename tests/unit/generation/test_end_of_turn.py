"""Where responses end: the template's token, EOS, the model's settings, the teacher's tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from transformers import GenerationConfig

from pocl_ds.generation.end_of_turn import find_teacher_end_ids, recorded_end_ids, with_end_ids
from pocl_ds.generation.protocol import decode_response, find_stop_token_ids
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(eos: str, template: str | None = None) -> Any:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    return tokenizer


def test_generation_stops_at_the_templates_end_of_turn() -> None:
    tokenizer = make_tokenizer("<|endoftext|>", CHATML)
    end = tokenizer.vocab["<|im_end|>"]
    assert find_stop_token_ids(tokenizer, None) == [0, end]
    settings = SimpleNamespace(eos_token_id=[7, 8])
    assert find_stop_token_ids(tokenizer, settings, [9]) == [0, 7, 8, 9, end]
    assert find_stop_token_ids(make_tokenizer("<|endoftext|>"), None) == [0]


def test_a_base_student_stops_where_its_instruct_teacher_does() -> None:
    """The teacher's EOS has an id in the student's vocabulary, but no role there."""
    student, teacher = make_tokenizer("<|endoftext|>"), make_tokenizer("<|im_end|>")
    ends = find_teacher_end_ids(teacher, None, student)
    assert ends == [student.vocab["<|im_end|>"]]
    answer = [*student("Paris")["input_ids"], *ends, *student("user asks again")["input_ids"]]
    stops = find_stop_token_ids(student, None, ends)
    assert decode_response(student, answer, stops) == "Paris"
    assert find_teacher_end_ids(teacher, None, tiny_models.make_tokenizer()) == []


def test_the_end_ids_are_those_of_the_data(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert recorded_end_ids(run) == []
    run.data.mkdir()
    write_manifest(run.data, "preprocess", "f", info={"end_of_turn_ids": [3, 0]})
    assert recorded_end_ids(run) == [3, 0]


@pytest.mark.parametrize(
    ("own", "added", "expected"),
    [(0, [3, 0], [0, 3]), ([0, 5], [3], [0, 5, 3]), (None, [], None), (0, [], 0), (None, [4], 4)],
)
def test_exported_settings_stop_there_too(own: Any, added: list[int], expected: Any) -> None:
    config = GenerationConfig(eos_token_id=own, temperature=0.5, do_sample=True)
    result = with_end_ids(config, added)
    assert result.eos_token_id == expected and result.temperature == 0.5
