"""The forms of a record, and how each becomes a conversation.

Every record is recognized by itself, so one file may hold several forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pocl_ds.data.conversation import ASSISTANT, DEVELOPER, SYSTEM, USER, Message
from pocl_ds.data.field_names import METADATA_FIELDS, MappedRecord, is_empty, list_fields
from pocl_ds.data.messages import TurnReader, is_turn_list, last_assistant
from pocl_ds.data.tool_calls import read_tools
from pocl_ds.errors import DataError

PREFERENCE_FIELDS = ("chosen", "rejected")
ANSWERING = (ASSISTANT, "gpt")  # roles with which a list of turns without its prompt begins


@dataclass(frozen=True)
class Conversation:
    """The content of one record."""

    messages: list[Message]
    input: str = ""
    other_references: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    dropped_turns: int = 0  # after the last turn that trains


@dataclass(frozen=True)
class RecordFormat:
    """A record format. A record that has something in the first of `fields` is of this format."""

    fields: tuple[str, ...]
    read: Callable[[MappedRecord, TurnReader], Conversation]
    optional: tuple[str, ...] = ()

    @property
    def required(self) -> list[str]:
        """Fields that every record must have."""
        return [name for name in self.fields if name not in self.optional]


def read_conversation(
    record: MappedRecord, format: str, turns: TurnReader, train_on: str
) -> tuple[str, Conversation]:
    """The name of a record's format and its content, which ends with the training response.

    format: `auto` or a key of RECORD_FORMATS. train_on: `all_turns`, or `last_turn` of the
    assistant. Raises DataError, which names the place and the remedy.
    """
    _check_marks(record)
    name = recognize(record) if format == "auto" else format
    conversation = RECORD_FORMATS[name].read(record, turns)
    if name == "text":
        return name, conversation
    messages, dropped = _end_conversation(conversation.messages, train_on, record.place)
    return name, replace(conversation, messages=messages, dropped_turns=dropped)


def recognize(record: MappedRecord) -> str:
    """The format of a record. Raises DataError if it has none."""
    # A mapped field decides; a field that holds something comes before an empty one.
    mapped = record.mapping.mapped
    for name, form in RECORD_FORMATS.items():
        if form.fields[0] in mapped and record.has(form.fields[0]):
            return name
    if record.has("messages"):
        return "messages"
    _check_preferences(record)
    for name, form in RECORD_FORMATS.items():
        if name != "text" and record.has(form.fields[0]):
            return name
    if record.has("input") and record.has("output"):
        return "alpaca"
    if record.has("text") and _holds_only_text(record):
        return "text"
    # For a message that names the empty field.
    for name, form in RECORD_FORMATS.items():
        if name != "text" and record.has_column(form.fields[0]):
            return name
    setting = record.mapping.setting
    needs = ", or ".join(" and ".join(form.required) for form in RECORD_FORMATS.values())
    raise DataError(
        f"{record.place}: no known record format (fields: {list_fields(record.record)}): it needs "
        f"{needs}; map other names with {setting}, as in {setting}.output=answer",
        reason="unknown format",
    )


def _holds_only_text(record: MappedRecord) -> bool:
    text = record.name("text")
    return all(
        name == text or name in METADATA_FIELDS or is_empty(value)
        for name, value in record.record.items()
    )


def _check_preferences(record: MappedRecord) -> None:
    """Refuse a pair of answers, unless a mapping names the one to learn."""
    chosen, rejected = (record.record.get(name) for name in PREFERENCE_FIELDS)
    if record.has("output") or is_empty(chosen) or is_empty(rejected):
        return
    if isinstance(chosen, list) and is_turn_list(chosen):
        first = chosen[0] if isinstance(chosen[0], dict) else {}
        field = "output" if first.get("role", first.get("from")) in ANSWERING else "messages"
    else:
        has_question = any(record.has(name) for name in ("instruction", "prompt", "input"))
        field = "output" if has_question else "text"
    raise DataError(
        f"{record.place}: it has `chosen` and `rejected` answers, as preference data do: "
        f"{record.mapping.setting}.{field}=chosen trains on the chosen ones",
        reason="preference data",
    )


def _check_marks(record: MappedRecord) -> None:
    """Refuse a record that is marked as a bad answer, or has a weight other than 1."""
    setting = record.mapping.setting
    label = record.peek("label")
    if isinstance(label, bool):
        record.get("label")
        if not label:
            raise DataError(
                f"{record.place}: field {record.name('label')!r} is false, which marks a bad "
                f"answer in KTO data: remove the record, or set {setting}.label=null to ignore the "
                "mark",
                reason="label false",
            )
    weight = record.get("weight")
    if not is_empty(weight) and (isinstance(weight, bool) or weight != 1):
        raise DataError(
            f"{record.place}: field {record.name('weight')!r} is {str(weight)[:80]}, and all "
            f"samples weigh the same: remove it, or set {setting}.weight=null to ignore it",
            reason="weight",
        )


def _read_alpaca(record: MappedRecord, turns: TurnReader) -> Conversation:
    return _read_question(record, turns, "instruction")


def _read_prompt(record: MappedRecord, turns: TurnReader) -> Conversation:
    return _read_question(record, turns, "prompt")


def _read_question(record: MappedRecord, turns: TurnReader, field: str) -> Conversation:
    """A question and its answer, each a text or a list of turns."""
    input_text = record.text("input") or ""
    value, name = record.get(field), record.name(field)
    if is_turn_list(value):
        prompt = turns.read(value, name, record.place, ends=False)
        # The prompt is not to be learned, as in TRL.
        prompt = [replace(m, train=False) if m.role == ASSISTANT else m for m in prompt]
    else:
        question = record.text(field)
        may_lack = field not in record.mapping.mapped or record.has_column(field)
        if question is None and input_text and may_lack:
            question, input_text = input_text, ""
        if question is None:
            raise record.missing(field, "the question")
        prompt = [*_read_history(record), Message(USER, question)]
    prompt = _with_system(prompt, record)
    answer, references = _read_answer(record, turns)
    return Conversation([*prompt, *answer], input_text, references, _read_tools(record))


def _read_answer(record: MappedRecord, turns: TurnReader) -> tuple[list[Message], tuple[str, ...]]:
    """The messages of an answer, and other texts that are as good."""
    value, name = record.get("output"), record.name("output")
    if is_empty(value):
        raise record.missing("output", "the answer")
    if is_turn_list(value):
        messages = turns.read(value, name, record.place)
        if messages[0].role in (USER, SYSTEM, DEVELOPER):
            raise DataError(
                f"{record.place}: field {name!r} begins with a turn of the {messages[0].role}, so "
                f"it holds the prompt too: name it with {record.mapping.setting}.messages instead",
                reason="answer with its prompt",
            )
        return messages, ()
    reasoning = record.text("reasoning") or ""
    if not isinstance(value, list):
        text = record.text("output")
        return [Message(ASSISTANT, text or "", reasoning)], ()
    texts = [str(t) if isinstance(t, int) and not isinstance(t, bool) else t for t in value]
    if not all(isinstance(text, str) and not is_empty(text) for text in texts):
        raise DataError(
            f"{record.place}: {name} must be text or a list of texts, none empty: fix or remove it",
            reason="empty text" if any(map(is_empty, texts)) else "wrong type",
        )
    return [Message(ASSISTANT, texts[0], reasoning)], tuple(texts[1:])


def _read_messages(record: MappedRecord, turns: TurnReader) -> Conversation:
    value = record.get("messages")
    if is_empty(value):
        raise record.missing("messages", "the turns")
    messages = turns.read(value, record.name("messages"), record.place)
    return Conversation(_with_system(messages, record), tools=_read_tools(record))


def _read_text(record: MappedRecord, turns: TurnReader) -> Conversation:
    text = record.text("text")
    if text is None:
        raise record.missing("text", "the text")
    return Conversation([Message(ASSISTANT, text)])


def _read_history(record: MappedRecord) -> list[Message]:
    """Earlier turns as pairs of a question and its answer."""
    value, name = record.get("history"), record.name("history")
    if is_empty(value):
        return []
    messages = []
    for number, pair in enumerate(value if isinstance(value, list) else [None], 1):
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not all(isinstance(t, str) and not is_empty(t) for t in pair):
            raise DataError(
                f"{record.place}: pair {number} of field {name!r} must be the texts of a question "
                "and its answer: fix or remove the record, or set "
                f"{record.mapping.setting}.history=null to ignore the field",
                reason="history",
            )
        messages += [Message(USER, pair[0]), Message(ASSISTANT, pair[1])]
    return messages


def _read_tools(record: MappedRecord) -> tuple[dict[str, Any], ...]:
    setting = f"{record.mapping.setting}.tools"
    return read_tools(record.get("tools"), record.place, record.name("tools"), setting)


def _with_system(messages: list[Message], record: MappedRecord) -> list[Message]:
    """The messages after the system text of a separate field."""
    text = record.text("system")
    if text is None:
        return messages
    if messages[0].role not in (SYSTEM, DEVELOPER):
        return [Message(SYSTEM, text), *messages]
    if messages[0].content == text:
        return messages
    raise DataError(
        f"{record.place}: both the field {record.name('system')!r} and turn 1 "
        f"({messages[0].role}) are a system text: remove one, or set "
        f"{record.mapping.setting}.system=null to read the turn alone",
        reason="two system texts",
    )


def _end_conversation(
    messages: list[Message], train_on: str, place: str
) -> tuple[list[Message], int]:
    """The messages up to the last one that trains, and how many others follow it."""
    end = last_assistant(messages, trained=True)
    if end < 0:
        role = "no turn of the assistant"
        if last_assistant(messages) >= 0:
            role = "no turn of the assistant that trains (their weight is 0, or train is false)"
        raise DataError(
            f"{place}: the conversation has {role}: fix or remove the record",
            reason="no turn trains" if "trains" in role else "no turn of the assistant",
        )
    if not any(message.role == USER for message in messages[:end]):
        raise DataError(
            f"{place}: no turn of a user comes before the last turn of the assistant: fix or "
            "remove the record",
            reason="no turn of a user",
        )
    conversation = messages[: end + 1]
    if train_on == "last_turn":
        last = last_assistant(conversation)
        conversation = [
            replace(m, train=False) if m.role == ASSISTANT and index != last else m
            for index, m in enumerate(conversation)
        ]
    return conversation, len(messages) - len(conversation)


# In order of recognition.
RECORD_FORMATS = {
    "messages": RecordFormat(("messages",), _read_messages),
    "alpaca": RecordFormat(("instruction", "input", "output"), _read_alpaca, optional=("input",)),
    "prompt": RecordFormat(("prompt", "output"), _read_prompt),
    "text": RecordFormat(("text",), _read_text),
}
