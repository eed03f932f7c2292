"""The fields of a record: their common names, a recipe's mapping of other names, and paths."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from pocl_ds.errors import DataError

MAX_LISTED_FIELDS = 20  # in an error message
MAX_REMEMBERED_COLUMNS = 1000  # sets of columns whose fields are known without a search
# Canonical field names, and the names that common data sets use for them, most specific first.
FIELD_NAMES = {
    "id": ("id",),
    "instruction": ("instruction", "question"),
    "prompt": ("prompt",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "reasoning": ("reasoning_content",),
    "label": ("label",),
    "weight": ("weight",),
    "domain": (),  # only where a mapping names it
}
# Fields that describe a record, and hold nothing that a model should read.
# fmt: off
METADATA_FIELDS = frozenset((
    "id", "idx", "index", "uid", "uuid", "key", "prompt_id", "message_id", "conversation_id",
    "hash", "source", "sources", "dataset", "data_source", "origin", "split", "subset", "category",
    "subcategory", "topic", "task_type", "task_name", "domain", "type", "tags", "language", "lang",
    "language_score", "difficulty", "level", "quality", "score", "token_count", "num_tokens",
    "num_turns", "length", "url", "file_path", "path", "filename", "dump", "date", "time",
    "timestamp", "created_at", "model", "model_name", "generator", "license", "version", "meta",
    "metadata", "__index_level_0__",
))
# fmt: on


class FieldMapping:
    """Which fields of a source's records serve as which canonical fields.

    fields: canonical name -> name or path in the records (`answers.text.0`); None or an empty text
    for a field that is not to be read. setting: the recipe field of that mapping, for messages.
    """

    def __init__(self, fields: Mapping[str, str | None], setting: str) -> None:
        self.setting = setting
        self.mapped = {field: name for field, name in fields.items() if name}
        self.ignored = [field for field, name in fields.items() if not name]
        # A mapped column serves no other field.
        mapped_columns = {
            part for name in self.mapped.values() for part in (name, name.partition(".")[0])
        }
        self.automatic = {
            field: tuple(name for name in names if name not in mapped_columns)
            for field, names in FIELD_NAMES.items()
            if field not in fields
        }
        self._absent = dict(self.mapped)
        self._present: dict[tuple[str, ...], dict[str, list[str]]] = {}

    def present_names(self, record: Mapping[str, Any]) -> dict[str, list[str]]:
        """The names of a record that automatically serve a field, for each field that has any."""
        columns = tuple(record)
        present = self._present.get(columns)
        if present is None:
            if len(self._present) >= MAX_REMEMBERED_COLUMNS:
                self._present.clear()
            present = {
                field: columns_of_field
                for field, names in self.automatic.items()
                if (columns_of_field := [name for name in names if name in record])
            }
            self._present[columns] = present
        return present

    def note_fields(self, record: Mapping[str, Any]) -> None:
        """Note which mapped fields a record has."""
        if self._absent:
            self._absent = {
                field: name for field, name in self._absent.items() if not _find(record, name)[0]
            }

    def check_all_present(self, source: str, example: Mapping[str, Any]) -> None:
        """Raise DataError if no record had a mapped field: it would be ignored silently.

        example: a record, whose fields the message lists.
        """
        for field, name in self._absent.items():
            raise DataError(
                f"{source}: no record has the field {name!r}, which {self.setting}.{field} names "
                f"(fields: {list_fields(example)}): correct {self.setting}",
                reason="missing field",
            )


class MappedRecord:
    """One record, read by canonical field names. `used`: columns that were read -> their field."""

    def __init__(self, record: Mapping[str, Any], place: str, mapping: FieldMapping) -> None:
        self.record, self.place, self.mapping = record, place, mapping
        self.used: dict[str, str] = {}
        self._present = mapping.present_names(record)

    def name(self, field: str) -> str:
        """The record's name for a field; its most common one if the record has none."""
        if field in self.mapping.mapped:
            return self.mapping.mapped[field]
        present = self._present.get(field)
        if not present:
            return next(iter(self.mapping.automatic.get(field, ())), field)
        if len(present) > 1:
            return next((n for n in present if not is_empty(self.record[n])), present[0])
        return present[0]

    def peek(self, field: str) -> Any:
        """The value of a field, None if the record lacks it; the field does not count as used."""
        if field in self.mapping.mapped:
            return plain_value(_find(self.record, self.mapping.mapped[field])[1], self.place)
        if field not in self._present:
            return None
        return plain_value(self.record[self.name(field)], self.place)

    def get(self, field: str) -> Any:
        """The value of a field, None if the record lacks it."""
        if field in self._present:
            self.used[self.name(field)] = field
        elif field in self.mapping.mapped:
            name = self.mapping.mapped[field]
            column = name if name in self.record else name.partition(".")[0]
            if column in self.record:
                self.used[column] = field
        return self.peek(field)

    def has_column(self, field: str) -> bool:
        """True if the record has a field, though perhaps an empty one."""
        if field in self.mapping.mapped:
            return _find(self.record, self.mapping.mapped[field])[0]
        return field in self._present

    def has(self, field: str) -> bool:
        """True if a field holds anything."""
        return not is_empty(self.peek(field))

    def text(self, field: str) -> str | None:
        """The text of a field; None if the record lacks it or it is empty."""
        value = self.get(field)
        if is_empty(value):
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.wrong_type(field, value, "text")
        return value

    def wrong_type(self, field: str, value: Any, expected: str) -> DataError:
        """The error of a field whose value has another type."""
        name = self.name(field)
        remedy = "fix or remove the record"
        if isinstance(value, dict):
            part = next(iter(value), "text")
            remedy = f"name a part of it, as in {self.mapping.setting}.{field}={name}.{part}"
        return DataError(
            f"{self.place}: field {name!r} must be {expected}, found {_describe(value)}: {remedy}",
            reason="wrong type",
        )

    def missing(self, field: str, holds: str) -> DataError:
        """The error of a record without a field. holds: what the field should hold."""
        name, setting = self.name(field), f"{self.mapping.setting}.{field}"
        if _find(self.record, name)[0]:
            return DataError(
                f"{self.place}: field {name!r} is empty: fix or remove the record",
                reason="empty text",
            )
        if field in self.mapping.mapped:
            problem = f"there is no field {name!r}, which {setting} names"
            remedy = f"correct {self.mapping.setting}, or fix or remove the record"
        else:
            problem = f"there is no field {name!r}"
            remedy = f"add it, or name the one that holds {holds} with {setting}"
        return DataError(
            f"{self.place}: {problem} (fields: {list_fields(self.record)}): {remedy}",
            reason="missing field",
        )


def is_empty(value: Any) -> bool:
    """True for None and NaN, a text without a visible character, and a list or object of none."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, (list, tuple, dict, bytes)) and not value)


def plain_value(value: Any, place: str) -> Any:
    """A value of a numpy array or of a binary column as JSON has it."""
    if value is None or isinstance(value, (str, int, float, list, dict)):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise DataError(
                f"{place}: a binary field is not UTF-8 text: convert or remove it",
                reason="not UTF-8",
            ) from None
    return value.tolist() if hasattr(value, "tolist") else value


def list_fields(record: Mapping[str, Any]) -> str:
    """The field names of a record, at most MAX_LISTED_FIELDS."""
    omitted = len(record) - MAX_LISTED_FIELDS
    more = f" and {omitted} more" if omitted > 0 else ""
    return ", ".join(str(name)[:80] for name in islice(record, MAX_LISTED_FIELDS)) + more


def _find(record: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Whether a record has a name or path, and its value."""
    if path in record:
        return True, record[path]
    value: Any = record
    for part in path.split("."):
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


def _describe(value: Any) -> str:
    """What a value of a wrong type is, for messages."""
    if isinstance(value, dict):
        return f"an object with {list_fields(value)}" if value else "an object without fields"
    return type(value).__name__
