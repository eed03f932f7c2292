"""Messages from the turns of a record, in the forms of OpenAI, ShareGPT, TRL and LLaMA-Factory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pocl_ds.data.conversation import ASSISTANT, ROLES, TOOL, USER, Message
from pocl_ds.data.field_names import is_empty, plain_value
from pocl_ds.data.tool_calls import read_tool_calls
from pocl_ds.errors import DataError

CALL = "function_call"  # a turn of the assistant whose content is the JSON text of a call
# Names of roles in common data sets, in lower case.
ROLE_NAMES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), USER),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "ai"), ASSISTANT),
    **dict.fromkeys(
        ("observation", "function", "ipython", "function_response", "tool_response"), TOOL
    ),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TRAIN_KEYS = ("train", "loss")  # of axolotl, of ms-swift


@dataclass(frozen=True)
class TurnReader:
    """Reads the turns of conversations.

    roles: names of roles in the records -> one of ROLES, beside those of ROLE_NAMES. count_unused:
    receives the name of every key of a turn that is not used.
    """

    roles: Mapping[str, str]
    count_unused: Callable[[str], None]

    def read(self, value: Any, name: str, place: str, *, ends: bool = True) -> list[Message]:
        """The messages of a field of turns. Raises DataError, which names place, turn and role.

        name: the field, for messages. ends: the conversation ends here, so that turns after the
        last one of the assistant may be empty, since they are dropped later.
        """
        messages: list[Message] = []
        numbers: list[int] = []  # of the turn of each message
        after_call = False
        for number, turn in enumerate(_list_turns(value, name, place), 1):
            reader = _Turn(turn, f"{place}: turn {number} of {name}", self.roles)
            message = reader.message()
            for key in reader.unused_keys():
                self.count_unused(key)
            is_call = reader.role == CALL
            if is_call and after_call and message.train == messages[-1].train:
                # Several calls at once are one message.
                calls = messages[-1].tool_calls + message.tool_calls
                messages[-1] = replace(messages[-1], tool_calls=calls)
                continue
            after_call = is_call
            messages.append(message)
            numbers.append(number)
        end = last_assistant(messages) + 1 if ends else len(messages)
        for message, number in zip(messages[:end], numbers):
            _check_content(message, f"{place}: turn {number} of {name} ({message.role})")
        return messages


def last_assistant(messages: list[Message], *, trained: bool = False) -> int:
    """Index of the last message of the assistant, -1 without one. trained: that trains."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == ASSISTANT and (messages[index].train or not trained):
            return index
    return -1


def is_turn_list(value: Any) -> bool:
    """True for a list of objects or of lists of pairs, as turns are."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            or (isinstance(turn, list) and bool(turn) and isinstance(turn[0], tuple))
            for turn in value
        )
    )


class _Turn:
    """Reads one turn. `role` is one of ROLES, or CALL."""

    def __init__(self, turn: Any, where: str, roles: Mapping[str, str]) -> None:
        self.keys, self.used = _keys_of_turn(turn, where), set[str]()
        self.where = where
        name = self._take(ROLE_KEYS)
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{where} has no role (keys: {', '.join(map(str, self.keys)) or 'none'}): give it "
                "`role` and `content`, or `from` and `value`",
                reason="no role",
            )
        self.where = f"{where} ({name})"
        role = roles.get(name) or ROLE_NAMES.get(name.strip().lower())
        if role is None:
            raise DataError(
                f"{where} has the unknown role {name[:80]!r}: map it to one of "
                f"{', '.join(ROLES)} with data.roles",
                reason="unknown role",
            )
        self.role = role

    def message(self) -> Message:
        """The message of this turn."""
        content = plain_value(self._take(CONTENT_KEYS), self.where)
        if len(self.used) == len(self.keys) and isinstance(content, str) and self.role != CALL:
            return Message(self.role, content)  # the usual turn has nothing else
        trains = self._trains()
        name = self._text("name")
        if self.role == CALL:
            calls = read_tool_calls(content, self.where, "content")
            return Message(ASSISTANT, "", self._reasoning(), calls, name, train=trains)
        if self.role == ASSISTANT:
            text = self._content(content)
            return Message(ASSISTANT, text, self._reasoning(), self._calls(), name, train=trains)
        if self.role == TOOL:
            if isinstance(content, dict):  # a result as an object
                content = json.dumps(content, ensure_ascii=False)
            return Message(
                TOOL, self._content(content), name=name, tool_call_id=self._text("tool_call_id")
            )
        return Message(self.role, self._content(content), name=name)

    def unused_keys(self) -> list[str]:
        """Keys with a value that `message` has not read."""
        return [
            str(key)
            for key, value in self.keys.items()
            if key not in self.used and not is_empty(value)
        ]

    def _take(self, names: tuple[str, ...]) -> Any:
        """The value of the first of some keys that is filled, or else is not null."""
        chosen = None
        for name in names:
            value = self.keys.get(name)
            if not is_empty(value):
                chosen = name
                break
            if value is not None and chosen is None:
                chosen = name
        if chosen is None:
            return None
        self.used.add(chosen)
        return self.keys[chosen]

    def _text(self, name: str) -> str:
        value = self._take((name,))
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "text")
        return value or ""

    def _reasoning(self) -> str:
        value = self._take(REASONING_KEYS)
        if value is not None and not isinstance(value, str):
            raise self._wrong("reasoning_content", value, "text")
        return value or ""

    def _calls(self) -> tuple[dict[str, Any], ...]:
        for name in ("tool_calls", "function_call"):
            value = plain_value(self._take((name,)), self.where)
            if value is not None:
                return read_tool_calls(value, self.where, name)
        return ()

    def _content(self, content: Any) -> str:
        """The text of a content: a text, or a list of parts of type text."""
        if content is None or isinstance(content, str):
            return content or ""
        if not isinstance(content, list):
            raise self._wrong("content", content, "text or a list of text parts")
        return "".join(self._part(part) for part in content)

    def _part(self, part: Any) -> str:
        if isinstance(part, str):
            return part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise DataError(
                f"{self.where} holds a content part of type {str(kind)[:80]!r}, and only parts of "
                "type 'text' can be read: remove the part or the record",
                reason="content part",
            )
        return text

    def _trains(self) -> bool:
        """Whether a turn's own marks let it train."""
        if not is_empty(self.keys.get("train_detail")):
            raise DataError(
                f"{self.where} has a train_detail, and parts of a turn cannot be left out of the "
                "loss: remove it, or mark whole turns with `train`",
                reason="train_detail",
            )
        trains = True
        weight = plain_value(self._take(("weight",)), self.where)
        if weight is not None:
            if isinstance(weight, bool) or weight not in (0, 1):
                raise DataError(
                    f"{self.where} has the weight {str(weight)[:80]}, and a turn either trains or "
                    "does not: use 1 or 0",
                    reason="weight",
                )
            trains = weight == 1
        for name in TRAIN_KEYS:
            value = plain_value(self.keys.get(name), self.where)
            if name == "train" and value is not None and not isinstance(value, bool):
                raise self._wrong(name, value, "true or false")
            if isinstance(value, bool):
                self.used.add(name)
                trains = trains and value
                self._check_role_trains(name, value)
        return trains

    def _check_role_trains(self, name: str, value: bool) -> None:
        if value and self.role not in (ASSISTANT, CALL):
            raise DataError(
                f"{self.where} has `{name}: true`, and only turns of the assistant can train: "
                "set it to false or remove it",
                reason="train of another role",
            )

    def _wrong(self, name: str, value: Any, expected: str) -> DataError:
        return DataError(
            f"{self.where}: {name} must be {expected}, found {type(value).__name__}: fix or remove "
            "the record",
            reason="wrong type",
        )


def _check_content(message: Message, where: str) -> None:
    """Raise DataError if a turn that needs a text has none."""
    if message.role not in (USER, ASSISTANT) or message.tool_calls:
        return
    if is_empty(message.content):
        raise DataError(f"{where} is empty: fix or remove the record", reason="empty text")


def _list_turns(value: Any, name: str, place: str) -> list[Any]:
    """The turns of a field: a list, its JSON text, or an object of lists with one key each."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list):
            raise DataError(
                f"{place}: field {name!r} is text, but not the JSON of a list of turns: fix or "
                "remove the record",
                reason="wrong type",
            )
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        sizes = {len(column) for column in value.values()}
        if len(sizes) == 1:
            value = [dict(zip(value, turn)) for turn in zip(*value.values())]
    if not isinstance(value, list):
        raise DataError(
            f"{place}: field {name!r} must be a list of turns, found {type(value).__name__}: fix "
            "or remove the record",
            reason="wrong type",
        )
    return value


def _keys_of_turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn as an object: one, or the key-value pairs of an Arrow map."""
    if isinstance(turn, dict):
        return turn
    pairs = turn if isinstance(turn, list) else []
    are_pairs = all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in pairs
    )
    if pairs and are_pairs:
        return dict(pairs)
    raise DataError(
        f"{where} must be an object with a role and a content, found {type(turn).__name__}: fix or "
        "remove the record",
        reason="wrong type",
    )
