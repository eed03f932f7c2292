"""Turns of every common form become messages, and an error names line, turn and role."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from pocl_ds.config import DataConfig
from pocl_ds.data.conversation import ROLES, Message
from pocl_ds.data.messages import ROLE_NAMES, TurnReader, is_turn_list
from pocl_ds.errors import DataError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(turns: Any, roles: dict[str, str] | None = None) -> list[Message]:
    return TurnReader(roles or {}, lambda key: None).read(turns, "messages", "x.jsonl line 7")


def read_error(turns: Any, reason: str) -> str:
    with pytest.raises(DataError) as caught:
        read(turns)
    message = str(caught.value)
    assert message.startswith("x.jsonl line 7") and "\n" not in message
    assert caught.value.reason == reason
    return message


def unused_keys(*turns: dict[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    TurnReader({}, lambda key: counts.update([key])).read(list(turns), "messages", "x line 1")
    return counts


class TestRoles:
    @pytest.mark.parametrize(
        ("name", "role"),
        [
            ("user", "user"),
            ("human", "user"),
            ("prompter", "user"),
            ("User", "user"),
            ("gpt", "assistant"),
            ("bot", "assistant"),
            ("model", "assistant"),
            ("system", "system"),
            ("developer", "developer"),
            ("observation", "tool"),
            ("function", "tool"),
            ("tool_response", "tool"),
        ],
    )
    def test_names_of_common_formats(self, name: str, role: str) -> None:
        for turn in ({"role": name, "content": "x"}, {"from": name, "value": "x"}):
            assert read([turn])[0].role == role

    def test_the_recipe_maps_other_names(self) -> None:
        roles = DataConfig(source="x.jsonl", roles={"narrator": "system", "bot": "user"}).roles
        turns = [{"role": "narrator", "content": "x"}, {"role": "bot", "content": "y"}]
        assert [message.role for message in read(turns, dict(roles))] == ["system", "user"]

    def test_an_unknown_role_is_refused(self) -> None:
        message = read_error([USER, {"role": "narrator", "content": "x"}], "unknown role")
        assert message == (
            "x.jsonl line 7: turn 2 of messages has the unknown role 'narrator': map it "
            "to one of system, developer, user, assistant, tool with data.roles"
        )

    def test_every_role_has_its_own_name(self) -> None:
        assert all(ROLE_NAMES[role] == role for role in ROLES)

    @pytest.mark.parametrize("turn", [{}, {"content": "x"}, {"role": 3, "content": "x"}])
    def test_a_turn_needs_a_role(self, turn: dict[str, Any]) -> None:
        assert "turn 1 of messages has no role" in read_error([turn], "no role")


class TestContainers:
    def test_json_text_columns_and_pairs(self) -> None:
        expected = read([USER, ANSWER])
        assert read(json.dumps([USER, ANSWER])) == expected
        assert read({"role": ["user", "assistant"], "content": ["Q", "A"]}) == expected
        assert read([list(USER.items()), list(ANSWER.items())]) == expected
        assert read([[["role", "user"], ["content", "Q"]], ANSWER]) == expected

    @pytest.mark.parametrize(
        ("value", "found"),
        [
            (3, "found int"),
            ("hello", "not the JSON of a list of turns"),
            ('{"role": "user"}', "not the JSON of a list of turns"),
            ("[" * 100_000, "not the JSON of a list of turns"),
            ({"role": "user", "content": "x"}, "found dict"),
            ({"role": ["user"], "content": []}, "found dict"),
            ([3], "turn 1 of messages must be an object"),
            ([["role", "user"]], "turn 1 of messages must be an object"),
            ([[]], "turn 1 of messages must be an object"),
            ([[[1, "user"]]], "turn 1 of messages must be an object"),
        ],
    )
    def test_other_values_are_refused(self, value: Any, found: str) -> None:
        assert found in read_error(value, "wrong type")

    def test_lists_of_turns_are_told_from_texts(self) -> None:
        assert is_turn_list([USER]) and is_turn_list([[("role", "user")]])
        assert not any(map(is_turn_list, (["a"], [], "a", [USER, "a"], [["q", "a"]], None)))


class TestContent:
    def test_text_parts_are_joined(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}, "c"]
        assert read([{"role": "user", "content": parts}])[0].content == "abc"

    @pytest.mark.parametrize(
        ("part", "kind"),
        [
            ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
            ({"type": "text", "text": 3}, "text"),
            (3, "int"),
            ({"text": "x"}, "None"),
        ],
    )
    def test_other_parts_are_refused(self, part: Any, kind: str) -> None:
        message = read_error([USER, {"role": "assistant", "content": [part]}], "content part")
        assert f"turn 2 of messages (assistant) holds a content part of type '{kind}'" in message

    @pytest.mark.parametrize("content", ["", " \n", None, []])
    @pytest.mark.parametrize("role", ["user", "assistant"])
    def test_empty_turns_are_refused(self, role: str, content: Any) -> None:
        turns = [USER, ANSWER, {"role": role, "content": content}, ANSWER]
        message = read_error(turns, "empty text")
        assert message == (
            f"x.jsonl line 7: turn 3 of messages ({role}) is empty: fix or remove the record"
        )

    def test_empty_turns_after_the_last_answer_are_no_error(self) -> None:
        assert len(read([USER, ANSWER, {"role": "user", "content": ""}])) == 3

    def test_system_and_tool_turns_may_be_empty(self) -> None:
        turns = [{"role": "system", "content": ""}, USER, {"role": "tool", "content": "\n"}, ANSWER]
        assert [message.content for message in read(turns)] == ["", "Q", "\n", "A"]

    def test_the_result_of_a_tool_may_be_an_object(self) -> None:
        assert read([{"role": "tool", "content": {"°C": 3}}])[0].content == '{"°C": 3}'
        assert "content must be text" in read_error([{**USER, "content": {"a": 1}}], "wrong type")

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
    def test_thoughts(self, name: str) -> None:
        (message,) = read([{**ANSWER, name: "because"}])
        assert (message.reasoning_content, message.content) == ("because", "A")

    def test_names_and_ids_of_calls_stay(self) -> None:
        turn = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}
        assert read([turn]) == [Message("tool", "4", name="add", tool_call_id="c1")]


class TestToolCalls:
    @pytest.mark.parametrize(
        "calls",
        [
            [CALL],
            json.dumps([CALL]),
            [json.dumps(CALL)],
            CALL,
            [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
            [{"name": "add", "arguments": {"a": 1}}],
            [{"name": "add", "arguments": '{"a": 1}', "id": None}],
        ],
    )
    def test_calls_of_every_form(self, calls: Any) -> None:
        (message,) = read([{"role": "assistant", "content": None, "tool_calls": calls}])
        assert message == Message("assistant", "", tool_calls=(CALL,))

    def test_ids_stay(self) -> None:
        (message,) = read([{"role": "assistant", "tool_calls": [{"id": "c1", **CALL}]}])
        assert message.tool_calls == ({"id": "c1", **CALL},)

    def test_a_call_without_arguments(self) -> None:
        empty: list[Any] = [{}, "", None]
        for arguments in empty:
            call = {"function": {"name": "now", "arguments": arguments}}
            (message,) = read([{"role": "assistant", "tool_calls": [call]}])
            assert message.tool_calls[0]["function"] == {"name": "now", "arguments": {}}

    def test_legacy_function_calls(self) -> None:
        turn = {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}}
        assert read([turn])[0].tool_calls == (CALL,)

    @pytest.mark.parametrize("role", ["function_call", "tool_call"])
    def test_turns_whose_content_is_a_call(self, role: str) -> None:
        content = json.dumps({"name": "add", "arguments": {"a": 1}})
        turns = [
            {"from": "human", "value": "Q"},
            {"from": role, "value": content},
            {"from": role, "value": content},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ]
        messages = read(turns)
        assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
        assert messages[1].tool_calls == (CALL, CALL)  # several calls at once

    @pytest.mark.parametrize(
        "calls",
        ["add", [{"arguments": {}}], [{"name": "add", "arguments": "{"}], [3], [[CALL]]],
    )
    def test_other_calls_are_refused(self, calls: Any) -> None:
        turn = {"role": "assistant", "content": "A", "tool_calls": calls}
        message = read_error([USER, turn], "tool calls")
        assert "turn 2 of messages (assistant): tool_calls must hold calls with a name" in message
        assert "turn 1 of messages (function_call): content must" in read_error(
            [{"role": "function_call", "content": "add(1)"}], "tool calls"
        )


class TestTrainingMarks:
    @pytest.mark.parametrize(
        ("mark", "trains"),
        [
            ({"weight": 1}, True),
            ({"weight": 0}, False),
            ({"weight": 0.0}, False),
            ({"train": True}, True),
            ({"train": False}, False),
            ({"train": None}, True),
            ({"loss": False}, False),
            ({"train": True, "weight": 0}, False),
        ],
    )
    def test_marks_of_a_turn(self, mark: dict[str, Any], trains: bool) -> None:
        assert read([USER, {**ANSWER, **mark}])[1].train is trains

    @pytest.mark.parametrize("weight", [0.5, 2, -1, "1", True, [1]])
    def test_other_weights_are_refused(self, weight: Any) -> None:
        message = read_error([USER, {**ANSWER, "weight": weight}], "weight")
        assert (
            "turn 2 of messages (assistant) has the weight" in message and "use 1 or 0" in message
        )

    def test_other_marks_are_refused(self) -> None:
        assert "train must be true or false" in read_error([{**ANSWER, "train": 1}], "wrong type")
        detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
        assert "train_detail" in read_error([{**ANSWER, "train_detail": detail}], "train_detail")
        message = read_error([{**USER, "train": True}], "train of another role")
        assert "turn 1 of messages (user) has `train: true`" in message
        assert read([{**USER, "train": False, "weight": 0}, ANSWER])[0].train


def test_unused_keys_are_counted() -> None:
    turns: list[dict[str, Any]] = [
        {**USER, "recipient": "all", "name": "Ann", "audio": None},
        {**ANSWER, "recipient": "all", "annotations": [], "refusal": "", "value": "other"},
        {**USER, "reasoning_content": "hm", "tool_calls": [CALL]},
        {**ANSWER, "reasoning": "a", "thinking": "b"},
    ]
    assert unused_keys(*turns) == {
        "recipient": 2,
        "value": 1,
        "reasoning_content": 1,
        "tool_calls": 1,
        "thinking": 1,
    }
