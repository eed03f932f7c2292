"""Instruction samples from records of any common format.

Formats: Alpaca and Dolly records (`instruction`, `input` or `context`, `output` or `response`),
prompt and completion, chat messages (`messages` or ShareGPT's `conversations`). The first record
decides the format, and the log names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from pocl_ds.data.key_table import KeyTable
from pocl_ds.errors import ArtifactError, DataError

log = logging.getLogger("pocl_ds")

MAX_ID_BYTES = 128
MIN_WORDS_OF_LONG_TEXT = 10  # two samples do not share a text of so many words by chance
MAX_LISTED_FIELDS = 20  # in an error message
# Canonical field names, and the names that common data sets use for them, most specific first.
FIELD_NAMES = {
    "id": ("id",),
    "instruction": ("instruction", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "prompt": ("prompt",),
    "messages": ("messages", "conversations"),
}
SYSTEM_FIELDS = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
OnInvalid: TypeAlias = Callable[[DataError], object]


@dataclass(frozen=True, slots=True)
class Sample:
    """An instruction with its references, of which the first is the training response."""

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()  # earlier turns, as (role, content)
    ended: bool = True  # false if the first reference was cut off, so that no EOS may follow it

    def to_json(self) -> str:
        """The sample as one line of a sample file."""
        tree = asdict(self)
        if self.ended:
            del tree["ended"]
        return json.dumps(tree, ensure_ascii=False)

    @property
    def prompt_key(self) -> str:
        """sha256 of the prompt's content; samples that share it are never in two splits."""
        prompt = json.dumps([self.history, self.instruction, self.input], ensure_ascii=False)
        return hashlib.sha256(prompt.encode()).hexdigest()


@dataclass(frozen=True)
class _RecordFields:
    """The content of one record."""

    instruction: str
    input: str
    references: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()


def long_text_key(text: str) -> int | None:
    """64-bit hash of a text, ignoring case and white space; None for a short text."""
    words = text.lower().split()
    if len(words) < MIN_WORDS_OF_LONG_TEXT:
        return None
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big")


def samples_from_records(
    records: Iterable[tuple[str, Any]],
    source: str,
    format: str,
    fields: Mapping[str, str],
    setting: str = "data.fields",
    on_invalid: OnInvalid | None = None,
) -> Iterator[Sample]:
    """Turn (place, record) pairs into samples; a place is `FILE line N`.

    fields: canonical field name -> the name in the records, where they differ. setting: the recipe
    field of that mapping, for error messages. on_invalid: receives the error of a record without
    usable content, which is then skipped. A sample keeps the id of its record, or gets a hash of
    its content. Raises DataError, which names the place and the remedy.
    """
    reader: _RecordReader | None = None
    ids, content_counts = KeyTable(), KeyTable()
    for place, record in records:
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: a record must be an object with named fields, found "
                f"{type(record).__name__}"
            )
        # The first record decides the format.
        if reader is None:
            _check_field_mapping(record, place, fields, setting)
            reader = _RecordReader(record, place, format, fields, setting)
            log.info("%s: records of format %s", source, reader.description())
            if ignored := reader.ignored_system_field(record):
                log.warning(
                    "%s: the field %s is ignored: make it a turn of `messages` if models are to "
                    "see it",
                    source,
                    ignored,
                )
        # Read the content, and skip a record without any.
        try:
            content = reader.read(record, place)
            parts = [content.history, content.instruction, content.input, content.references]
            encoded = _encode(json.dumps(parts, ensure_ascii=False), place)
        except DataError as error:
            if on_invalid is None:
                raise
            on_invalid(error)
            continue
        record_id = record.get(reader.names["id"])
        if record_id is None or record_id == "":
            sample_id = _content_id(encoded, content_counts)
        else:
            sample_id = _unique_id(record_id, place, ids)
        yield Sample(
            sample_id, content.instruction, content.input, content.references, content.history
        )
    if reader is None:
        raise DataError(f"{source} holds no samples: check that it is the right file")


def read_sample_file(path: Path) -> Iterator[Sample]:
    """Read a jsonl file of `Sample.to_json` lines. Raises ArtifactError if it is damaged."""
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                tree = json.loads(line)
                history = tuple((role, content) for role, content in tree["history"])
                sample = Sample(
                    tree["id"],
                    tree["instruction"],
                    tree["input"],
                    tuple(tree["references"]),
                    history,
                    tree.get("ended", True),
                )
            except (ValueError, KeyError, TypeError):
                raise ArtifactError(
                    f"{path} line {number} is damaged: remove its folder and run its step again"
                ) from None
            yield sample


class _RecordReader:
    """Reads records of one format."""

    def __init__(
        self,
        record: dict[str, Any],
        place: str,
        format: str,
        fields: Mapping[str, str],
        setting: str,
    ) -> None:
        self.setting, self.mapped = setting, frozenset(fields)
        self.names = {field: _name_in_record(record, field, fields) for field in FIELD_NAMES}
        recognized = self._recognize(record) if format == "auto" else format
        if recognized is None:
            needs = ", or ".join(" and ".join(form.required) for form in RECORD_FORMATS.values())
            raise DataError(
                f"{place}: no known record format (fields: {_list_fields(record)}): it needs "
                f"{needs}; map other names with {setting}, as in {setting}.output=answer"
            )
        self.format = recognized

    def _recognize(self, record: dict[str, Any]) -> str | None:
        return next(
            (name for name, form in RECORD_FORMATS.items() if self.names[form.fields[0]] in record),
            None,
        )

    def description(self) -> str:
        """The format and the field names in use, for the log."""
        names = ", ".join(self.names[field] for field in RECORD_FORMATS[self.format].fields)
        return f"{self.format} ({names})"

    def ignored_system_field(self, record: dict[str, Any]) -> str | None:
        """Name of a system prompt that this format has no place for."""
        if self.format == "messages":
            return None
        used = set(self.names.values())
        return next((name for name in SYSTEM_FIELDS if record.get(name) and name not in used), None)

    def read(self, record: dict[str, Any], place: str) -> _RecordFields:
        """The content of a record. Raises DataError if a field is missing or has another type."""
        return RECORD_FORMATS[self.format].read(self, record, place)

    def read_alpaca(self, record: dict[str, Any], place: str) -> _RecordFields:
        """Read an instruction with an optional input."""
        instruction = self._text(record, "instruction", place)
        if "input" not in self.mapped:  # records may name the input differently, or lack it
            names = (name for name in FIELD_NAMES["input"] if record.get(name))
            self.names["input"] = next(names, self.names["input"])
        has_input = record.get(self.names["input"]) is not None
        input_text = self._text(record, "input", place) if has_input else ""
        return _RecordFields(instruction, input_text, self._references(record, place))

    def read_prompt(self, record: dict[str, Any], place: str) -> _RecordFields:
        """Read a prompt and its completion."""
        prompt = self._text(record, "prompt", place)
        return _RecordFields(prompt, "", self._references(record, place))

    def read_messages(self, record: dict[str, Any], place: str) -> _RecordFields:
        """Read turns, of which the last answered one becomes the sample."""
        if self.names["messages"] not in record:
            raise DataError(
                f"{place}: there is no field {self.names['messages']!r} (fields: "
                f"{_list_fields(record)}): add it, or name the one that holds the turns with "
                f"{self.setting}.messages"
            )
        value = record[self.names["messages"]]
        turns = [_read_turn(turn, place) for turn in (value if isinstance(value, list) else [])]
        # Drop the turns after the last answer.
        while turns and turns[-1][0] != "assistant":
            turns.pop()
        answered = len(turns) >= 2 and turns[-2][0] == "user"
        if not answered or not all(text.strip() for _, text in turns[-2:]):
            raise DataError(
                f"{place}: messages must hold a user's turn answered by the assistant: fix or "
                "remove the record"
            )
        return _RecordFields(turns[-2][1], "", (turns[-1][1],), tuple(turns[:-2]))

    def _references(self, record: dict[str, Any], place: str) -> tuple[str, ...]:
        output = record.get(self.names["output"])
        if output is None:
            raise DataError(
                f"{place}: there is no field {self.names['output']!r} (fields: "
                f"{_list_fields(record)}): add it, or name the one that holds the answer with "
                f"{self.setting}.output"
            )
        references = tuple(output) if isinstance(output, list) else (output,)
        if not references or not all(isinstance(text, str) and text.strip() for text in references):
            raise DataError(
                f"{place}: {self.names['output']} must be text or a list of texts, none empty: fix "
                "or remove it"
            )
        return references

    def _text(self, record: dict[str, Any], field: str, place: str) -> str:
        value = record.get(self.names[field])
        if isinstance(value, str) and (value.strip() or field == "input"):
            return value
        if value is None:
            problem = "nothing"
        else:
            problem = "an empty text" if isinstance(value, str) else type(value).__name__
        raise DataError(
            f"{place}: field {self.names[field]!r} must be text, found {problem}: fix or remove "
            "the record"
        )


@dataclass(frozen=True)
class _RecordFormat:
    """A record format. A record that has the first of `fields` is of this format."""

    fields: tuple[str, ...]
    read: Callable[[_RecordReader, dict[str, Any], str], _RecordFields]
    optional: tuple[str, ...] = ()

    @property
    def required(self) -> list[str]:
        """Fields that every record must have."""
        return [name for name in self.fields if name not in self.optional]


# In order of recognition: a format whose first field also occurs in another one comes after that.
RECORD_FORMATS = {
    "messages": _RecordFormat(("messages",), _RecordReader.read_messages),
    "alpaca": _RecordFormat(
        ("instruction", "input", "output"), _RecordReader.read_alpaca, optional=("input",)
    ),
    "prompt": _RecordFormat(("prompt", "output"), _RecordReader.read_prompt),
}


def _read_turn(turn: Any, place: str) -> tuple[str, str]:
    """Role and content of one message."""
    role = content = None
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{place}: each message needs a role and a text content: fix or remove the record"
        )
    return ROLES.get(role, role), content


def _content_id(encoded: bytes, counts: KeyTable) -> str:
    """An id from a record's content; exact duplicates are numbered."""
    sample_id = hashlib.sha256(encoded).hexdigest()[:16]
    key = int(sample_id, 16)
    duplicates = counts.put(key, counts.get(key) + 1)
    return f"{sample_id}-{duplicates}" if duplicates else sample_id


def _unique_id(value: Any, place: str, ids: KeyTable) -> str:
    """The record's own id. Raises DataError if it is invalid or occurred before."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(
            f"{place}: an id must be a text or a whole number, found {type(value).__name__}: fix "
            "it or leave it out"
        )
    sample_id = str(value)
    if len(_encode(sample_id, place)) > MAX_ID_BYTES or "\n" in sample_id or "\0" in sample_id:
        raise DataError(
            f"{place}: an id must be at most {MAX_ID_BYTES} bytes without line breaks: shorten it "
            "or leave it out"
        )
    unit, _, number = place.rpartition(" ")  # FILE line N
    key = int(hashlib.sha256(sample_id.encode()).hexdigest()[:16], 16)
    if earlier := ids.put(key, int(number)):
        raise DataError(
            f"{place}: id {sample_id!r} also occurs at {unit} {earlier}: make ids unique, or leave "
            "them out"
        )
    return sample_id


def _name_in_record(record: dict[str, Any], field: str, fields: Mapping[str, str]) -> str:
    if field in fields:
        return fields[field]
    return next((name for name in FIELD_NAMES[field] if name in record), FIELD_NAMES[field][0])


def _list_fields(record: dict[str, Any]) -> str:
    """The field names of a record, at most MAX_LISTED_FIELDS."""
    omitted = len(record) - MAX_LISTED_FIELDS
    more = f" and {omitted} more" if omitted > 0 else ""
    return ", ".join(str(name)[:80] for name in islice(record, MAX_LISTED_FIELDS)) + more


def _check_field_mapping(
    record: dict[str, Any], place: str, fields: Mapping[str, str], setting: str
) -> None:
    """Raise DataError if a mapped field is missing, since a misspelled `input` would be ignored."""
    for field, name in fields.items():
        if name not in record:
            raise DataError(
                f"{place}: there is no field {name!r}, which {setting}.{field} names (fields: "
                f"{_list_fields(record)}): correct {setting}"
            )


def _encode(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: a text holds half a character (a lone surrogate): fix or remove the record"
        ) from None
