"""Samples as conversations: their JSON, references and responses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data.conversation import ROLES, Message, Sample, read_sample_file
from pocl_ds.errors import ArtifactError

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(ROLES),
    content=TEXT,
    reasoning_content=TEXT,
    tool_calls=st.sampled_from([(), (CALL,), (CALL, CALL)]),
    name=TEXT,
    tool_call_id=TEXT,
    train=st.booleans(),
)
SAMPLES = st.builds(
    Sample,
    id=TEXT,
    messages=st.lists(MESSAGES, min_size=1, max_size=5).map(tuple),
    input=TEXT,
    other_references=st.lists(TEXT, max_size=2).map(tuple),
    tools=st.sampled_from([(), (CALL,)]),
    source=TEXT,
    place=TEXT,
    verbatim=st.booleans(),
    ended=st.booleans(),
)


@given(SAMPLES)
def test_json_holds_the_whole_sample_in_one_line(sample: Sample) -> None:
    line = sample.to_json()
    assert "\n" not in line and Sample.from_json(line) == sample


def test_a_damaged_sample_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for damage in ("{", "[]", '{"id": "a"}', '{"id": "a", "messages": [{"role": "user"}]}'):
        path.write_text(Sample.from_instruction("a", "q", "r").to_json() + f"\n{damage}\n")
        with pytest.raises(ArtifactError, match="train.jsonl line 2 is damaged: remove"):
            list(read_sample_file(path))


def test_prompt_response_and_references() -> None:
    turns = (Message("system", "S"), Message("user", "q"), Message("assistant", "a"))
    sample = Sample("s", (*turns, Message("user", "p"), Message("assistant", "b")), "", ("c",))
    assert sample.instruction == "p" and sample.response.content == "b"
    assert sample.references == ("b", "c") and len(sample.prompt) == 4
    assert sample.label == "sample s"
    other = sample.with_reference("c")
    assert other.references == ("c",) and other.prompt == sample.prompt
    assert sample.with_reference("b").references == ("b",)


def test_a_tool_call_is_a_reference() -> None:
    """A response without content would have nothing to compare with."""
    response = Message("assistant", "", reasoning_content="r", tool_calls=(CALL,))
    sample = Sample("s", (Message("user", "q"), response))
    (reference,) = sample.references
    assert reference == '{"name": "add", "arguments": {"x": 1}}'
    assert sample.with_reference(reference).response == response
    assert sample.with_reference("3").response == Message("assistant", "3")


def test_of_a_models_response_only_that_trains() -> None:
    sample = Sample(
        "s",
        (
            Message("user", "q"),
            Message("assistant", "a"),
            Message("user", "p"),
            Message("assistant", "b"),
        ),
        "",
        ("c",),
        place="x.jsonl line 3",
    )
    answered = sample.with_response("It is", ended=False)
    assert answered.verbatim and not answered.ended and answered.references == ("It is",)
    assert [message.train for message in answered.messages] == [False, False, False, True]
    assert answered.label == "sample s (x.jsonl line 3)"
