"""Instruction samples from files and the Hub, whatever form they come in.

Forms: Alpaca and Dolly records (`instruction`, `input` or `context`, `output` or `response`),
prompt and completion, chat messages (`messages` or ShareGPT's `conversations`). The form is decided
by the first record, and said in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from pocl_ds.data.key_set import SeenKeys
from pocl_ds.errors import ArtifactError, DataError

log = logging.getLogger("pocl_ds")

MAX_ID_BYTES = 128
LONG = 10  # words of a text that two samples do not share by chance
SHOWN = 20  # names of a record that a sentence lists
FILES = (".jsonl", ".json", ".parquet")
# What our fields are called in data sets that people use, most specific first.
NAMES = {
    "id": ("id",),
    "instruction": ("instruction", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "prompt": ("prompt",),
    "messages": ("messages", "conversations"),
}
SYSTEM = ("system", "system_prompt")
Parts: TypeAlias = tuple[
    str, str, tuple[str, ...], tuple[tuple[str, str], ...]
]  # instruction, input, references, history
OnInvalid: TypeAlias = Callable[[DataError], object]
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One instruction with its references; the first is the one trained on. history: earlier turns,
    (role, content).
    """

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()
    ended: bool = True  # false where the first reference was cut off: no EOS may follow it

    def to_json(self) -> str:
        """One line of a normalised file."""
        tree = asdict(self)
        if self.ended:
            del tree["ended"]
        return json.dumps(tree, ensure_ascii=False)

    @property
    def prompt_key(self) -> str:
        """sha256 of what the model is asked: samples that share it never lie in two splits."""
        asked = json.dumps([self.history, self.instruction, self.input], ensure_ascii=False)
        return hashlib.sha256(asked.encode()).hexdigest()


def text_key(text: str) -> int | None:
    """64 bits of a text, whatever its case and white space; None where it has fewer than LONG
    words.
    """
    words = text.lower().split()
    return (
        int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big")
        if len(words) >= LONG
        else None
    )


def read_samples(
    source: str,
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    hub_subset: str | None = None,
    hub_split: str = "train",
    hub_revision: str | None = None,
    setting: str = "data.fields",
    invalid: OnInvalid | None = None,
) -> Iterator[Sample]:
    """Samples of a .jsonl, .json or .parquet file, or of a data set on the Hub, one at a time.

    fields: our name -> the name in the file, where they differ; setting: where a recipe says so.
    Ids are the records' own, else a hash of the content. invalid: told of a record that says
    nothing to learn from, which is then left out. Raises DataError naming file, line and remedy.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        raise DataError(f"data file {source} is a folder: name a {', '.join(FILES)} file in it")
    if path.suffix in FILES:
        records = _file_records(path)
    elif (there := os.path.exists(path)) or source.startswith(("/", ".", "~")):
        fault = "has an unknown ending" if there else "does not exist"
        raise DataError(f"data file {source} {fault}: give a {', '.join(FILES)} file or a Hub name")
    else:
        records = _hub_records(source, hub_subset, hub_split, hub_revision)
    yield from normalise(records, source, format, fields or {}, setting, invalid)


def normalise(
    records: Iterable[tuple[str, Any]],
    source: str,
    format: str,
    fields: Mapping[str, str],
    setting: str = "data.fields",
    invalid: OnInvalid | None = None,
) -> Iterator[Sample]:
    """Turn (place, record) pairs into samples. invalid: as `read_samples` has it."""
    reader = None
    seen, contents = SeenKeys(), SeenKeys()
    for place, record in records:
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: a record must be an object with named fields, found "
                f"{type(record).__name__}"
            )
        if reader is None:
            _check_fields(record, place, fields, setting)
            reader = _Reader(record, place, format, fields, setting)
            log.info("%s: read as %s", source, reader.described())
            if unread := reader.unread(record):
                log.warning(
                    "%s: the field %s is not read: make it a turn of `messages` if models are to "
                    "see it",
                    source,
                    unread,
                )
        try:
            instruction, given, references, history = reader.read(record, place)
            said = _bytes(
                json.dumps([history, instruction, given, references], ensure_ascii=False), place
            )
        except DataError as fault:
            if invalid is None:
                raise
            invalid(fault)
            continue
        own = record.get(reader.names["id"])
        if own is None or own == "":
            identity = hashlib.sha256(said).hexdigest()[:16]
            key = int(identity, 16)
            earlier = contents.put(key, contents.get(key) + 1)
            if earlier:  # exact duplicates are numbered
                identity = f"{identity}-{earlier}"
        else:
            identity = _checked_id(own, place)
            unit, _, number = place.rpartition(" ")  # FILE line N
            earlier = seen.put(
                int(hashlib.sha256(identity.encode()).hexdigest()[:16], 16), int(number)
            )
            if earlier:
                raise DataError(
                    f"{place}: id {identity!r} stands at {unit} {earlier} too: make ids unique, "
                    f"or leave them out"
                )
        yield Sample(identity, instruction, given, references, history)
    if reader is None:
        raise DataError(f"{source} holds no samples: check that it is the right file")


def read_normalised(path: Path) -> Iterator[Sample]:
    """Samples of a file that this program wrote. Raises ArtifactError where it is damaged."""
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
                    f"{path} line {number} is damaged: remove its folder and run its stage again"
                ) from None
            yield sample


class _Reader:
    """Reads records of one form."""

    def __init__(
        self,
        record: dict[str, Any],
        place: str,
        format: str,
        fields: Mapping[str, str],
        setting: str,
    ) -> None:
        self.setting, self.mapped = setting, frozenset(fields)
        self.names = {ours: _named(record, ours, fields) for ours in NAMES}
        self.format = format if format != "auto" else self._recognise(record)
        if self.format is None:
            forms = ", or ".join(" and ".join(form.needed) for form in FORMS.values())
            raise DataError(
                f"{place}: no known form of record (fields: {_listed(record)}): it needs {forms}; "
                f"map other names with {setting}, as in {setting}.output=answer"
            )

    def _recognise(self, record: dict[str, Any]) -> Any:
        return next(
            (name for name, form in FORMS.items() if self.names[form.fields[0]] in record), None
        )

    def described(self) -> str:
        """The form and the names it uses, for the log."""
        return f"{self.format} records ({', '.join(self.names[name] for name in FORMS[self.format].fields)})"

    def unread(self, record: dict[str, Any]) -> str | None:
        """The field that tells the model how to behave, which records of texts have no place for."""
        known = set(self.names.values())
        return next(
            (
                name
                for name in SYSTEM
                if self.format != "messages" and record.get(name) and name not in known
            ),
            None,
        )

    def read(self, record: dict[str, Any], place: str) -> Parts:
        """What a record says."""
        return FORMS[self.format].read(self, record, place)

    def alpaca(self, record: dict[str, Any], place: str) -> Parts:
        """An instruction, perhaps with an input, whose name each record may write or leave out."""
        instruction = self._text(record, "instruction", place)
        if "input" not in self.mapped:
            self.names["input"] = next(
                (name for name in NAMES["input"] if record.get(name)), self.names["input"]
            )
        given = (
            "" if record.get(self.names["input"]) is None else self._text(record, "input", place)
        )
        return instruction, given, self._references(record, place), ()

    def prompt(self, record: dict[str, Any], place: str) -> Parts:
        """One text that is asked."""
        return self._text(record, "prompt", place), "", self._references(record, place), ()

    def _references(self, record: dict[str, Any], place: str) -> tuple[str, ...]:
        output = record.get(self.names["output"])
        if output is None:
            raise DataError(
                f"{place}: there is no field {self.names['output']!r} (fields: "
                f"{_listed(record)}): add it, or "
                f"name the one that holds the answer with {self.setting}.output"
            )
        references = tuple(output) if isinstance(output, list) else (output,)
        if not references or not all(isinstance(text, str) and text.strip() for text in references):
            raise DataError(
                f"{place}: {self.names['output']} must be text or a list of texts, none empty: "
                f"mend or remove it"
            )
        return references

    def messages(self, record: dict[str, Any], place: str) -> Parts:
        """Turns, of which the last answered one is asked."""
        if self.names["messages"] not in record:
            raise DataError(
                f"{place}: there is no field {self.names['messages']!r} (fields: "
                f"{_listed(record)}): "
                f"add it, or name the one that holds the turns with {self.setting}.messages"
            )
        raw = record[self.names["messages"]]
        turns = []
        for turn in raw if isinstance(raw, list) else []:
            role, content = (
                (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
                if isinstance(turn, dict)
                else (None, None)
            )
            if not isinstance(role, str) or not isinstance(content, str):
                raise DataError(
                    f"{place}: each message needs a role and a text content: mend or remove the "
                    f"record"
                )
            turns.append((ROLES.get(role, role), content))
        while turns and turns[-1][0] != "assistant":
            turns.pop()
        if (
            len(turns) < 2
            or turns[-2][0] != "user"
            or not all(text.strip() for _, text in turns[-2:])
        ):
            raise DataError(
                f"{place}: messages must hold a user's turn answered by the assistant: mend or "
                f"remove the record"
            )
        return turns[-2][1], "", (turns[-1][1],), tuple(turns[:-2])

    def _text(self, record: dict[str, Any], ours: str, place: str) -> str:
        value = record.get(self.names[ours])
        if not isinstance(value, str) or (ours != "input" and not value.strip()):
            found = (
                "nothing"
                if value is None
                else type(value).__name__
                if not isinstance(value, str)
                else "an empty text"
            )
            raise DataError(
                f"{place}: field {self.names[ours]!r} must be text, found {found}: mend or remove "
                f"the record"
            )
        return value


@dataclass(frozen=True)
class _Form:
    """A form of records. fields: ours, as in `NAMES`; a record that has the first one is of this
    form. optional: among them.
    """

    fields: tuple[str, ...]
    read: Callable[[_Reader, dict[str, Any], str], Parts]
    optional: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """The fields without which there is no record."""
        return [name for name in self.fields if name not in self.optional]


# The forms of `config.Format`, in the order in which they are looked for: one whose first field
# stands in records of another form too comes after that form.
FORMS = {
    "messages": _Form(("messages",), _Reader.messages),
    "alpaca": _Form(("instruction", "input", "output"), _Reader.alpaca, optional=("input",)),
    "prompt": _Form(("prompt", "output"), _Reader.prompt),
}


def _named(record: dict[str, Any], ours: str, fields: Mapping[str, str]) -> str:
    if ours in fields:
        return fields[ours]
    return next((name for name in NAMES[ours] if name in record), NAMES[ours][0])


def _listed(record: dict[str, Any]) -> str:
    """The names in a record, the first ones of many."""
    more = f" and {len(record) - SHOWN} more" if len(record) > SHOWN else ""
    return ", ".join(str(name)[:80] for name in islice(record, SHOWN)) + more


def _check_fields(
    record: dict[str, Any], place: str, fields: Mapping[str, str], setting: str
) -> None:
    """A field that a recipe maps is there: a misspelt `input` would otherwise be left out without a
    word.
    """
    for ours, theirs in fields.items():
        if theirs not in record:
            raise DataError(
                f"{place}: there is no field {theirs!r}, which {setting}.{ours} names (fields: "
                f"{_listed(record)}): correct {setting}"
            )


def _bytes(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: a text holds half a character (a lone surrogate): mend or remove the record"
        ) from None


def _checked_id(value: Any, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(
            f"{place}: an id must be a text or a whole number, found {type(value).__name__}: mend "
            f"it or leave it out"
        )
    identity = str(value)
    if len(_bytes(identity, place)) > MAX_ID_BYTES or "\n" in identity or "\0" in identity:
        raise DataError(
            f"{place}: an id must be at most {MAX_ID_BYTES} bytes without line breaks: shorten it "
            f"or leave it out"
        )
    return identity


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    if not os.path.isfile(path):
        raise DataError(
            f"data file {path} {'is no file' if os.path.exists(path) else 'does not exist'}: "
            f"check the path"
        )
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty: check that it is the right file")
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path)
        elif path.suffix == ".json":
            yield from _json_records(path)
        else:
            with path.open(
                encoding="utf-8-sig"
            ) as stream:  # some programs begin a file with a byte-order mark
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield (
                            f"{path} line {number}",
                            _json(line.rstrip(), f"{path} line {number}", "mend that line"),
                        )
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not UTF-8 ({error.reason}): convert it") from None
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror or error}): check it"
        ) from None


def _json(text: str, place: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} " if error.lineno > 1 else ""
        raise DataError(
            f"{place} is not valid JSON ({error.msg} at {at}column {error.colno}): {remedy}"
        ) from None
    except (RecursionError, ValueError):
        raise DataError(
            f"{place} is nested too deeply or holds too long a number: mend or remove the record"
        ) from None


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    remedy = "mend it, or let its name end in .jsonl if it holds a record a line"
    tree = _json(path.read_text(encoding="utf-8-sig"), f"data file {path}", remedy)
    if isinstance(tree, dict):  # {"data": [...]} and the like
        lists = [value for value in tree.values() if isinstance(value, list)]
        tree = lists[0] if len(lists) == 1 else None
    if not isinstance(tree, list):
        raise DataError(
            f"data file {path} must hold a list of records: convert it, or use .jsonl for a "
            f"record a line"
        )
    for number, record in enumerate(tree, 1):
        yield f"{path} record {number}", record


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", record
    except pa.ArrowInvalid as error:
        raise DataError(f"data file {path} is not a Parquet file ({error}): check it") from None


def _hub_records(
    name: str, subset: str | None, split: str, revision: str | None
) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated types, network ones among them
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data set {name!r} (subset {subset}, split {split!r}, revision {revision or 'main'}) "
            f"cannot be had "
            f"({type(error).__name__}: {reason}): check the name and the network, or give a "
            f".jsonl file"
        ) from None
    for number, record in enumerate(found, 1):
        yield f"{name} record {number}", record
