"""Records of public data sets and bug reports become the conversations that they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.records import RecordCounts, samples_from_records
from pocl_ds.errors import DataError

FILES = Path(__file__).parent / "files"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def records_of(name: str) -> Iterator[tuple[str, Any]]:
    path = FILES / name
    if path.suffix == ".parquet":
        records = pq.read_table(path).to_pylist()
    elif path.suffix == ".json":
        records = json.loads(path.read_text(encoding="utf-8"))
    else:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, record in enumerate(records, 1):
        yield f"{path} line {number}", record


def read(name: str, **options: Any) -> list[Sample]:
    return list(samples_from_records(records_of(name), name, **options))


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


PING = [("user", "Ping?"), ("assistant", "Pong.")]
ORCA = [("user", "Why is number {} odd?"), ("assistant", "Because it is.")]
CHILD = ("system", "You are a five year old child.")
PIRATE = ("system", "You answer like a pirate.")
# File, recipe fields, and the turns of its first samples.
CASES: dict[str, tuple[str, dict[str, Any], list[list[tuple[str, str]]]]] = {
    "a system column, not in the first record": (
        "openorca.jsonl",
        {},
        [
            [(role, text.format(n)) for role, text in ([CHILD] if n else []) + ORCA]
            for n in range(4)
        ],
    ),
    "a system column beside conversations": (
        "system_column.jsonl",
        {},
        [
            [
                ("system", "First think, then answer."),
                ("user", "1 + 1?"),
                ("assistant", "<|begin_of_thought|>easy<|end_of_thought|>2"),
            ]
        ],
    ),
    "an inline thought stays": (
        "think_inline.jsonl",
        {},
        [
            [
                ("user", f"What is 2 + 2? ({n})"),
                ("assistant", "<think>\nTwo and two make four.\n</think>\n\nIt is 4."),
            ]
            for n in range(2)
        ],
    ),
    "Hermes' tool turns": (
        "tools_hermes.jsonl",
        {},
        [
            [
                ("system", "You may call functions."),
                ("user", "Weather in Oslo?"),
                ("assistant", '<tool_call>{"name": "weather"}</tool_call>'),
                ("tool", "<tool_response>3 C</tool_response>"),
                ("assistant", "It is 3 degrees."),
            ]
        ],
    ),
    "a missing number of pandas is no input": (
        "nan.jsonl",
        {},
        [[("user", "Add."), ("assistant", "3")]] * 3,
    ),
    "a whole number as an answer": (
        "number.jsonl",
        {},
        [[("user", "2+2?"), ("assistant", "4")], [("user", "3+3?"), ("assistant", "6")]],
    ),
    "bytes": ("binary.parquet", {}, [PING]),
    "content parts": ("content_parts.parquet", {}, [PING, PING]),
    "Arrow maps": ("maps.parquet", {}, [PING]),
    "Arrow structs": ("structs.parquet", {}, [PING, PING]),
    "messages as JSON text": ("messages_as_json_text.parquet", {}, [PING, PING]),
    "input and output": (
        "input_output.jsonl",
        {},
        [[("user", f"Translate to French: cat {n}"), ("assistant", f"chat {n}")] for n in range(4)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_conversations(case: str) -> None:
    name, options, expected = CASES[case]
    samples = read(name, **options)
    assert [turns(sample) for sample in samples] == expected
    assert all(not sample.input and not sample.tools for sample in samples)


def test_all_answered_turns_train() -> None:
    (sample,) = read("three_turns.jsonl")
    assert [m.content for m in sample.messages if m.role == "assistant" and m.train] == [
        "Seven is a prime.",
        "Thirteen.",
        "Nineteen.",
    ]
    (last,) = read("three_turns.jsonl", train_on="last_turn")
    assert [m.content for m in last.messages if m.role == "assistant" and m.train] == ["Nineteen."]
    assert turns(last) == turns(sample) and last.id == sample.id


def test_tools_and_a_system_text_beside_a_conversation() -> None:
    samples = read("system_and_tools.json")
    assert len(samples) == 3
    for number, sample in enumerate(samples):
        question, answer = f"What is {number} plus {number}?", str(2 * number)
        assert turns(sample) == [PIRATE, ("user", question), ("assistant", answer)]
        assert sample.tools == ({"name": "add", "description": "adds", "parameters": {}},)


@pytest.mark.parametrize("name", ["tools_later_turn.jsonl", "tools_null_content.jsonl"])
def test_a_call_without_text_is_a_turn(name: str) -> None:
    (sample,) = read(name)
    assert sample.messages[1] == Message("assistant", "", tool_calls=(call("Oslo"),))
    assert sample.messages[2] == Message("tool", "3 C, rain", name="weather")
    assert sample.messages[3].content == "It rains at 3 degrees." and sample.tools == (WEATHER,)


def test_a_call_beside_text_is_the_answer() -> None:
    (sample,) = read("tools_call_with_text.jsonl")
    assert sample.response == Message("assistant", "I will look it up.", tool_calls=(call("Rome"),))
    assert sample.tools == (WEATHER,)


def test_a_thought_of_its_own() -> None:
    (sample,) = read("reasoning_content.jsonl")
    assert sample.response == Message("assistant", "It is 4.", "Two and two make four.")


def test_a_conversation_may_begin_with_the_assistant() -> None:
    samples = read("assistant_first.jsonl")
    greeted = samples[5]
    assert len(samples) == 12 and greeted.place == "assistant_first.jsonl line 6"
    assert turns(greeted)[:2] == [("assistant", "Hello, how can I help?"), ("user", "Say 5.")]
    assert greeted.messages[0].train


def test_a_truth_value_is_no_answer() -> None:
    with pytest.raises(DataError, match="line 1: field 'answer' must be text, found bool"):
        read("bool.jsonl")


def test_a_column_serves_one_field() -> None:
    mapped = read("input_output.jsonl", fields={"instruction": "input"})
    assert mapped == read("input_output.jsonl")


def test_paths_to_answers() -> None:
    (every,) = read("squad.parquet", fields={"output": "answers.text"})
    assert every.references == ("France", "in France") and every.input == "Paris is in France."
    (first,) = read("squad.parquet", fields={"output": "answers.text.0"})
    assert first.references == ("France",) and first.instruction == "Where is Paris?"
    with pytest.raises(DataError, match=r"found an object with text, answer_start: name a part"):
        read("squad.parquet", fields={"output": "answers"})


@pytest.mark.parametrize("nothing", [None, ""])
def test_equal_ids_can_be_ignored(nothing: str | None) -> None:
    samples = read("one_id.jsonl", fields={"id": nothing})
    assert len({sample.id for sample in samples}) == 3
    assert all(len(sample.id) == 16 for sample in samples)


def test_equal_ids_can_be_numbered() -> None:
    counts = RecordCounts()
    samples = read("one_id.jsonl", duplicate_ids="suffix", counts=counts)
    assert [sample.id for sample in samples] == ["QX1_0", "QX1_0-1", "QX1_0-2"]
    assert counts.renamed_ids == 2
    with pytest.raises(DataError, match=r"line 2: id 'QX1_0' also occurs at .* line 1.*suffix"):
        read("one_id.jsonl")


def test_an_optional_field_may_be_absent_at_first() -> None:
    fields = {"instruction": "q", "output": "a", "input": "passage"}
    assert [s.input for s in read("optional_input.jsonl", fields=fields)] == ["", "A long tale."]
    with pytest.raises(DataError, match=r"no record has the field 'pasage'.*\(fields: q, a, pass"):
        read("optional_input.jsonl", fields={**fields, "input": "pasage"})


def test_a_context_beside_a_prompt_is_its_input() -> None:
    (sample,) = read("prompt_context.jsonl")
    assert (sample.instruction, sample.input) == ("Who purrs?", "Cats purr.")
    assert sample.references == ("Cats.",)
