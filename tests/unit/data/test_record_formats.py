"""Every common form of record becomes the conversation that it says."""

from __future__ import annotations

import json
import logging
from typing import Any, get_args

import numpy as np
import pytest
from record_reading import GOOD, QA, TOOL, TURNS, counts_of, read, read_error, read_one

from pocl_ds.config.base import RecordField, RecordFormat, Role
from pocl_ds.data.conversation import ROLES, Message
from pocl_ds.data.field_names import FIELD_NAMES
from pocl_ds.data.record_formats import RECORD_FORMATS
from pocl_ds.data.records import RecordCounts


def test_every_format_and_field_of_the_recipe_is_implemented() -> None:
    assert {"auto", *RECORD_FORMATS} == set(get_args(RecordFormat))
    assert set(FIELD_NAMES) == set(get_args(RecordField))
    assert all(set(form.fields) <= set(FIELD_NAMES) for form in RECORD_FORMATS.values())
    assert set(ROLES) == set(get_args(Role))


class TestFlatRecords:
    @pytest.mark.parametrize(
        ("record", "instruction", "given_input", "references"),
        [
            (GOOD, "Add.", "1 2", ("3",)),
            ({"instruction": "Add.", "context": "1 2", "response": "3"}, "Add.", "1 2", ("3",)),
            ({"question": "Q", "context": "C", "answer": "A"}, "Q", "C", ("A",)),
            ({"prompt": "Add 1 2.", "completion": "3"}, "Add 1 2.", "", ("3",)),
            ({"prompt": "Add.", "input": "1 2", "completion": "3"}, "Add.", "1 2", ("3",)),
            ({"instruction": "Add.", "input": None, "output": "3"}, "Add.", "", ("3",)),
            ({"instruction": "Q", "output": ["A", "B"]}, "Q", "", ("A", "B")),
            ({"instruction": "Q", "output": ["A", 3]}, "Q", "", ("A", "3")),
            ({"instruction": "", "input": "Q", "output": "A"}, "Q", "", ("A",)),
            ({"context": "Q", "response": "A"}, "Q", "", ("A",)),
            ({"instruction": "Q", "output": "", "response": "A"}, "Q", "", ("A",)),
            ({"messages": [], "instruction": "Q", "output": "A"}, "Q", "", ("A",)),
            ({"instruction": None, "prompt": "Q", "completion": "A"}, "Q", "", ("A",)),
            ({"instruction": np.str_("Q"), "output": np.int64(4)}, "Q", "", ("4",)),
            ({"instruction": b"Q", "output": np.array(["A", "B"])}, "Q", "", ("A", "B")),
        ],
    )
    def test_known_names_are_recognized(
        self, record: dict[str, Any], instruction: str, given_input: str, references: tuple[str]
    ) -> None:
        sample = read_one(record)
        assert (sample.instruction, sample.input, sample.references) == (
            instruction,
            given_input,
            references,
        )
        assert [message.role for message in sample.messages] == ["user", "assistant"]
        assert sample.place == "x.jsonl line 1" and sample.source == ""

    def test_a_question_without_its_instruction_may_be_mapped(self) -> None:
        fields = {"instruction": "context"}
        sample = read_one({"context": "Q", "response": "A"}, fields=fields)
        assert list(sample.messages) == QA and sample.input == ""

    def test_system_history_tools_and_thought(self) -> None:
        record = {
            "system": "Be brief.",
            "history": [["One?", "1"], ("Two?", "2")],
            "instruction": "Q",
            "output": "A",
            "reasoning_content": "Hm.",
            "tools": json.dumps([TOOL]),
        }
        sample = read_one(record)
        assert list(sample.messages) == [
            Message("system", "Be brief."),
            Message("user", "One?"),
            Message("assistant", "1"),
            Message("user", "Two?"),
            Message("assistant", "2"),
            Message("user", "Q"),
            Message("assistant", "A", "Hm."),
        ]
        assert sample.tools == (TOOL,)
        fields = dict.fromkeys(("system", "history", "tools", "reasoning"))
        assert list(read_one(record, fields=fields).messages) == QA

    @pytest.mark.parametrize("history", [[], "", None])
    def test_an_empty_history(self, history: Any) -> None:
        assert (
            list(read_one({"instruction": "Q", "output": "A", "history": history}).messages) == QA
        )

    @pytest.mark.parametrize("history", ["a: b", [["a"]], [["a", ""]], [{"user": "a"}], [["a", 1]]])
    def test_another_history_is_refused(self, history: Any) -> None:
        message = read_error({**GOOD, "history": history}, reason="history")
        assert "line 1: pair 1 of field 'history'" in message
        assert "data.fields.history=null" in message

    @pytest.mark.parametrize("tools", ["add", ["add"], [{"description": "x"}], 3])
    def test_other_tools_are_refused(self, tools: Any) -> None:
        message = read_error({**GOOD, "tools": tools}, reason="tools")
        assert "field 'tools' must hold tools as JSON schemas" in message
        assert "data.fields.tools=null" in message

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"instruction": ["a"]}, "wrong type"),
            ({"instruction": " ", "input": ""}, "empty text"),
            ({"instruction": None, "input": None}, "empty text"),
            ({"instruction": True}, "wrong type"),
            ({"input": 3.5}, "wrong type"),
            ({"output": True}, "wrong type"),
            ({"output": 3.5}, "wrong type"),
            ({"output": " "}, "empty text"),
            ({"output": []}, "empty text"),
            ({"output": None}, "empty text"),
            ({"output": ["a", ""]}, "empty text"),
            ({"output": ["a", True]}, "wrong type"),
            ({"output": {"a": 1}}, "wrong type"),
            ({"output": b"\xff"}, "not UTF-8"),
            ({"instruction": "\ud800"}, "half a character"),
            ({"output": "\ud800"}, "half a character"),
            ({"id": "\ud800"}, "invalid id"),
            ({"id": [1]}, "invalid id"),
            ({"system": 3.5}, "wrong type"),
        ],
    )
    def test_invalid_values_are_refused(self, change: dict[str, Any], reason: str) -> None:
        assert "x.jsonl line 2" in read_error(GOOD, {**GOOD, **change}, reason=reason)

    def test_a_missing_answer(self) -> None:
        message = read_error(GOOD, {"instruction": "a", "text": "b"}, reason="missing field")
        assert message == (
            "dir/x.jsonl line 2: there is no field 'output' (fields: instruction, text): add it, "
            "or name the one that holds the answer with data.fields.output"
        )
        assert "field 'question' is empty" in read_error(
            {"question": "", "answer": "A"}, reason="empty text"
        )


class TestConversations:
    def test_conversational_prompt_and_completion(self) -> None:
        prompt = [*TURNS, {"role": "user", "content": "R"}]
        call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {}}]}
        completion = [call, {"role": "tool", "content": "2"}, TURNS[1]]
        sample = read_one({"prompt": prompt, "completion": completion, "tools": [TOOL]})
        # As in TRL, the completion trains and the prompt does not.
        assert [(message.role, message.train) for message in sample.messages] == [
            ("user", True),
            ("assistant", False),
            ("user", True),
            ("assistant", True),
            ("tool", True),
            ("assistant", True),
        ]
        assert sample.tools == (TOOL,)
        mixed = [{"prompt": TURNS[:1], "completion": "A"}, {"prompt": "Q", "completion": TURNS[1:]}]
        assert [list(sample.messages) for sample in read(*mixed)] == [QA, QA]

    def test_fields_that_only_texts_have_are_counted(self) -> None:
        turns = {"prompt": TURNS[:1], "completion": TURNS[1:]}
        counts = counts_of({**turns, "history": [["a", "b"]], "reasoning_content": "Hm."})
        assert counts.unused_fields == {"history": 1, "reasoning_content": 1}

    def test_a_completion_with_its_prompt_is_refused(self) -> None:
        message = read_error({"prompt": "Q", "completion": TURNS}, reason="answer with its prompt")
        assert "data.fields.messages" in message

    @pytest.mark.parametrize("name", ["messages", "conversations", "conversation"])
    def test_names_of_the_turns(self, name: str) -> None:
        assert list(read_one({name: TURNS}).messages) == QA

    def test_turns_after_the_last_answer_are_dropped_and_counted(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        bye = {"role": "user", "content": "Bye"}
        record = {"messages": [*TURNS, bye, {**TURNS[1], "weight": 0}, bye]}
        counts = RecordCounts()
        assert list(read_one(record, counts=counts).messages) == QA
        assert counts.dropped_turns == 3
        assert "x.jsonl: 3 turns after the last turn that trains dropped" in caplog.text

    def test_which_turns_train(self) -> None:
        record = {"messages": [*TURNS, *TURNS, TURNS[0], {**TURNS[1], "train": False}, *TURNS]}
        trained = [m.train for m in read_one(record).messages if m.role == "assistant"]
        assert trained == [True, True, False, True]
        last = [
            m.train
            for m in read_one(record, train_on="last_turn").messages
            if m.role == "assistant"
        ]
        assert last == [False, False, False, True]

    @pytest.mark.parametrize(
        ("turns", "reason"),
        [
            (TURNS[:1], "no turn of the assistant"),
            (TURNS[1:], "no turn of a user"),
            ([{"role": "system", "content": "a"}, TURNS[1]], "no turn of a user"),
            ([TURNS[1], TURNS[0]], "no turn of a user"),
            ([TURNS[0], {**TURNS[1], "weight": 0}], "no turn trains"),
        ],
    )
    def test_conversations_without_an_answer_are_refused(self, turns: Any, reason: str) -> None:
        message = read_error({"messages": turns}, reason=reason)
        assert "x.jsonl line 1: " in message and "assistant" in message

    def test_two_system_texts(self) -> None:
        system = {"role": "system", "content": "Be brief."}
        record = {"messages": [system, *TURNS], "system": "Be brief."}
        assert read_one(record) == read_one({"messages": [system, *TURNS]})
        message = read_error({**record, "system": "Be long."}, reason="two system texts")
        assert "both the field 'system' and turn 1 (system)" in message
        assert "data.fields.system=null" in message
        fields = {"system": None}
        assert read_one({**record, "system": "Be long."}, fields=fields) == read_one(record)

    def test_other_names_of_roles(self) -> None:
        turns = [{"role": "narrator", "content": "a"}, *TURNS]
        assert "line 1: turn 1 of messages has the unknown role 'narrator'" in read_error(
            {"messages": turns}, reason="unknown role"
        )
        sample = read_one({"messages": turns}, roles={"narrator": "system"})
        assert sample.messages[0] == Message("system", "a")


class TestOtherForms:
    def test_texts_have_no_prompt(self) -> None:
        (page, *_) = samples = read({"text": "Once.", "url": "x"}, {"text": "Twice."})
        assert page.messages == (Message("assistant", "Once."),) and page.prompt == ()
        assert len(samples) == 2
        classified = {"text": "Once.", "summary": "O."}
        assert "no known record format" in read_error(classified, reason="unknown format")
        assert read_one(classified, format="text").references == ("Once.",)
        assert read_one(classified, fields={"text": "summary"}).references == ("O.",)
        assert read_error({"text": " "}, reason="empty text", format="text")

    def test_several_forms_in_one_file(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        records = [GOOD, {"messages": TURNS, "instruction": None}, {"prompt": "Q", "answer": "A"}]
        counts = counts_of(*records, GOOD, {"text": "T"})
        assert counts.formats == {
            "alpaca (instruction, input, output)": 2,
            "messages (messages)": 1,
            "prompt (prompt, answer)": 1,
            "text (text)": 1,
        }
        assert (
            "dir/x.jsonl: 5 records: 2 of format alpaca (instruction, input, output); 1 of format "
            "messages (messages); 1 of format prompt (prompt, answer); 1 of format text (text)"
        ) in caplog.text

    @pytest.mark.parametrize(
        ("record", "remedy"),
        [
            ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "output"),
            ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, "output"),
            ({"prompt": "Q", "chosen": TURNS, "rejected": TURNS}, "messages"),
            ({"chosen": TURNS, "rejected": TURNS}, "messages"),
            ({"chosen": "Human: Q Assistant: A", "rejected": "Human: Q Assistant: B"}, "text"),
        ],
    )
    def test_preference_data_are_refused_with_a_mapping(
        self, record: dict[str, Any], remedy: str
    ) -> None:
        message = read_error(record, reason="preference data")
        assert message.endswith(f"data.fields.{remedy}=chosen trains on the chosen ones")
        sample = read_one(record, fields={remedy: "chosen"})
        assert sample.response.content in ("A", "Human: Q Assistant: A")

    def test_labels_of_kto(self) -> None:
        good, bad = ({"prompt": "Q", "completion": "A", "label": label} for label in (True, False))
        assert list(read_one(good).messages) == QA
        message = read_error(good, bad, reason="label false")
        assert "line 2: field 'label' is false" in message
        assert "data.fields.label=null" in message
        assert len(read(good, bad, fields={"label": None})) == 2
        assert counts_of({**good, "label": 3}).unused_fields == {"label": 1}

    def test_weights_of_samples(self) -> None:
        assert read_one({**GOOD, "weight": 1.0}) == read_one(GOOD)
        message = read_error({**GOOD, "weight": 0.5}, reason="weight")
        assert "field 'weight' is 0.5" in message and "data.fields.weight=null" in message
        assert read_one({**GOOD, "weight": 0.5}, fields={"weight": ""}) == read_one(GOOD)

    def test_an_unknown_format_is_refused(self) -> None:
        message = read_error({"q": "a", "a": "b"}, reason="unknown format")
        assert message == (
            "dir/x.jsonl line 1: no known record format (fields: q, a): it needs messages, or "
            "instruction and output, or prompt and output, or text; map other names with "
            "data.fields, as in data.fields.output=answer"
        )

    def test_an_ignored_field_does_not_decide_the_format(self) -> None:
        fields = {"messages": None}
        record = {"messages": TURNS, "prompt": "Q", "answer": "A"}
        assert list(read_one(record, fields=fields).messages) == QA
        assert read_error({"messages": TURNS}, reason="unknown format", fields=fields)

    def test_a_requested_format_that_lacks_its_field(self) -> None:
        message = read_error(GOOD, reason="missing field", format="messages")
        assert "no field 'messages'" in message and "data.fields.messages" in message

    @pytest.mark.parametrize("record", [[], "a", 3, None])
    def test_other_values_are_refused(self, record: Any) -> None:
        assert "must be an object" in read_error(record, reason="not an object")

    def test_deep_nesting_is_refused(self) -> None:
        deep: Any = "a"
        for _ in range(100_000):
            deep = [deep]
        tool = {**TOOL, "x": deep}
        assert read_error({**GOOD, "tools": [tool]}, reason="not JSON")
        deep_turns = {"messages": [TURNS[0], {**TURNS[1], "tool_calls": deep}]}
        assert read_error(deep_turns, reason="nested too deeply")
