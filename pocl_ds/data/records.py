"""Samples from records of any common form, with counts of everything that is not used.

record_formats.py recognizes a record's form, messages.py reads its turns, field_names.py finds its
fields, and sample_ids.py gives it an id.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from pocl_ds.data.conversation import Sample
from pocl_ds.data.field_names import (
    FIELD_NAMES,
    METADATA_FIELDS,
    FieldMapping,
    MappedRecord,
    is_empty,
)
from pocl_ds.data.json_document import MAX_RECORD_CHARACTERS, too_large
from pocl_ds.data.messages import TurnReader
from pocl_ds.data.record_formats import Conversation, read_conversation
from pocl_ds.data.sample_ids import SampleIds
from pocl_ds.data.text_encoding import sample_texts
from pocl_ds.errors import DataError

log = logging.getLogger("pocl_ds")

MIN_WORDS_OF_LONG_TEXT = 10  # two samples do not share a text of so many words by chance
MAX_COUNTED_NAMES = 1000  # different names of unused fields, beyond which they are counted as one
MAX_LOGGED_NAMES = 20
OnInvalid: TypeAlias = Callable[[DataError], object]


@dataclass
class RecordCounts:
    """What the records of one source hold, and what of it is not used."""

    records: int = 0
    formats: dict[str, int] = field(default_factory=dict)  # with the fields in use -> records
    unused_fields: dict[str, int] = field(default_factory=dict)  # name -> records
    unused_message_keys: dict[str, int] = field(default_factory=dict)  # name -> turns
    invalid: dict[str, int] = field(default_factory=dict)  # reason -> records
    dropped_turns: int = 0  # after the last turn that trains
    renamed_ids: int = 0  # duplicates with data.duplicate_ids=suffix


def long_text_key(text: str) -> int | None:
    """64-bit hash of a text, ignoring case and white space; None for a short text."""
    words = text.lower().split()
    if len(words) < MIN_WORDS_OF_LONG_TEXT:
        return None
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big")


def samples_from_records(
    records: Iterable[tuple[str, Any]],
    source: str,
    format: str = "auto",
    fields: Mapping[str, str | None] | None = None,
    *,
    setting: str = "data.fields",
    roles: Mapping[str, str] | None = None,
    train_on: str = "all_turns",
    duplicate_ids: str = "error",
    ids: SampleIds | None = None,
    on_invalid: OnInvalid | None = None,
    counts: RecordCounts | None = None,
) -> Iterator[Sample]:
    """Turn (place, record) pairs into samples; a place is `FILE line N`.

    A record that its file's reader could not parse is a DataError in its place. format: `auto` to
    recognize each record by itself, or a key of RECORD_FORMATS. fields: canonical field name ->
    name or path in the records, where they differ; None to ignore the field. setting: the recipe
    field of that mapping, for error messages. roles, train_on, duplicate_ids: see the recipe's
    section `data`. ids: the table of ids that several sources share, instead of duplicate_ids.
    on_invalid: receives the error of a record that cannot be used, which is then skipped. counts:
    receives what the records hold; give each source its own.

    Logs the forms and the counts of what is not used at the end. Raises DataError, which names the
    place and the remedy.
    """
    counts = RecordCounts() if counts is None else counts
    reader = _RecordReader(
        format, FieldMapping(fields or {}, setting), roles or {}, train_on, counts
    )
    ids = SampleIds(duplicate_ids, f"{setting}.id") if ids is None else ids
    renamed_before = ids.renamed
    first_error: DataError | None = None
    samples = 0
    for place, record in records:
        counts.records += 1
        try:
            own_id, domain, conversation = reader.read(record, place)
            sample = _make_sample(own_id, domain, conversation, ids, place)
            if (size := sum(map(len, sample_texts(sample)))) > MAX_RECORD_CHARACTERS:
                raise too_large(place, size)
        except DataError as error:
            counts.invalid[error.reason] = counts.invalid.get(error.reason, 0) + 1
            if on_invalid is None:
                raise
            on_invalid(error)
            first_error = first_error or error
            continue
        samples += 1
        counts.renamed_ids = ids.renamed - renamed_before
        yield sample
    reader.check_mapped_fields(source)
    if not counts.records:
        raise DataError(f"{source} holds no samples: check that it is the right file")
    if not samples:
        raise DataError(
            f"{source}: none of its {counts.records:,} records can be used; the first: "
            f"{first_error}"
        )
    _log_counts(source, counts, reader.ignored)


class _RecordReader:
    """Reads the records of one source, and counts what is not used."""

    def __init__(
        self,
        format: str,
        mapping: FieldMapping,
        roles: Mapping[str, str],
        train_on: str,
        counts: RecordCounts,
    ) -> None:
        self.format, self.mapping, self.train_on = format, mapping, train_on
        self.counts = counts
        self.turns = TurnReader(roles, lambda key: _count(counts.unused_message_keys, key))
        self.example: dict[str, Any] | None = None
        # Fields whose reading the mapping forbids need no warning.
        self.ignored = {name for field in mapping.ignored for name in FIELD_NAMES.get(field, ())}

    def read(self, record: Any, place: str) -> tuple[Any, str, Conversation]:
        """The record's id, its domain and its content. Raises DataError if it cannot be used."""
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: a record must be an object with named fields, found "
                f"{type(record).__name__}",
                reason="not an object",
            )
        self.example = record if self.example is None else self.example
        self.mapping.note_fields(record)
        mapped = MappedRecord(record, place, self.mapping)
        try:
            own_id, domain = mapped.get("id"), mapped.text("domain") or ""
            name, conversation = read_conversation(mapped, self.format, self.turns, self.train_on)
        except RecursionError:
            raise DataError(
                f"{place} is nested too deeply: fix or remove the record",
                reason="nested too deeply",
            ) from None
        self._count_fields(name, mapped)
        self.counts.dropped_turns += conversation.dropped_turns
        return own_id, domain, conversation

    def check_mapped_fields(self, source: str) -> None:
        """Raise DataError if no record has a field that the mapping names."""
        if self.example is not None:
            fields = {**self.example, **self.counts.unused_fields}
            self.mapping.check_all_present(source, fields)

    def _count_fields(self, format: str, record: MappedRecord) -> None:
        _count(self.counts.formats, self._form(format, tuple(record.used.items())))
        for name, value in record.record.items():
            if name not in record.used and not is_empty(value):
                _count(self.counts.unused_fields, str(name)[:80])

    @staticmethod
    @lru_cache(maxsize=1000)
    def _form(format: str, used: tuple[tuple[str, str], ...]) -> str:
        """A format with the fields in use, as in `alpaca (instruction, output)`."""
        order = [*FIELD_NAMES]
        in_order = sorted(used, key=lambda item: order.index(item[1]))
        return f"{format} ({', '.join(name for name, field in in_order if field != 'id')})"


def _make_sample(
    own_id: Any, domain: str, conversation: Conversation, ids: SampleIds, place: str
) -> Sample:
    """The sample of a record's content. Raises DataError if its texts or id are not valid."""
    content = [
        [message.to_template() for message in conversation.messages],
        conversation.input,
        conversation.other_references,
        conversation.tools,
    ]
    try:
        encoded = json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: a text holds half a character (a lone surrogate): fix or remove the record",
            reason="half a character",
        ) from None
    except (TypeError, ValueError, RecursionError):
        raise DataError(
            f"{place}: its tools or tool calls hold a value that JSON does not have: fix or remove "
            "the record",
            reason="not JSON",
        ) from None
    return Sample(
        ids.sample_id(own_id, encoded, place),
        tuple(conversation.messages),
        conversation.input,
        conversation.other_references,
        conversation.tools,
        domain=domain.strip(),
        place=place.rsplit("/", 1)[-1],
    )


def _count(table: dict[str, int], name: str) -> None:
    if name not in table and len(table) >= MAX_COUNTED_NAMES:
        name = "(other names)"
    table[name] = table.get(name, 0) + 1


def _log_counts(source: str, counts: RecordCounts, ignored: set[str]) -> None:
    """Log the forms of a source's records, and what of them is not used."""
    forms = "; ".join(f"{number:,} of format {name}" for name, number in counts.formats.items())
    log.info("%s: %s: %s", source, _number(counts.records, "record"), forms)
    harmless = METADATA_FIELDS | ignored
    for names, total, unit in (
        (counts.unused_fields, counts.records, "record"),
        (counts.unused_message_keys, None, "turn"),
    ):
        for level, group in (
            (logging.INFO, {name: n for name, n in names.items() if name in harmless}),
            (logging.WARNING, {name: n for name, n in names.items() if name not in harmless}),
        ):
            if group:
                log.log(level, "%s: %s", source, _unused_sentence(group, total, unit))
    if counts.dropped_turns:
        log.warning(
            "%s: %s after the last turn that trains dropped",
            source,
            _number(counts.dropped_turns, "turn"),
        )
    if counts.renamed_ids:
        log.warning(
            "%s: %s of an id that occurred before: got a suffix",
            source,
            _number(counts.renamed_ids, "record"),
        )


def _unused_sentence(names: Mapping[str, int], total: int | None, unit: str) -> str:
    """`123 of 4,000 records have the field 'topic', which is not used`."""
    kind = "field" if unit == "record" else "key"
    parts = []
    for name, number in list(names.items())[:MAX_LOGGED_NAMES]:
        subject = (
            _number(number, unit) if total is None else f"{number:,} of {_number(total, unit)}"
        )
        parts.append(f"{subject} {'has' if number == 1 else 'have'} the {kind} {name!r}")
    if len(names) > MAX_LOGGED_NAMES:
        parts.append(f"and {len(names) - MAX_LOGGED_NAMES:,} other names occur")
    verb = "which is not used" if len(names) == 1 else "which are not used"
    return f"{', '.join(parts)}, {verb}"


def _number(number: int, unit: str) -> str:
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"
