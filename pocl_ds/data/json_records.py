"""Records of JSON files: one per line, pretty-printed, in a list, in columns, or in splits.

The content decides, since files are often named .json with one record per line, or .jsonl with a
list. A reader of our own, and not the one of `datasets`: errors name the line, a damaged line can
be skipped, and records of different forms may stand in one file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pocl_ds.data.json_document import (
    MAX_RECORD_CHARACTERS,
    JsonDocument,
    beyond_limits,
    too_large,
)
from pocl_ds.data.json_trees import records_of_object
from pocl_ds.errors import DataError

MAX_FIRST_LINE_BYTES = 1 << 24  # a longer first line is read as a document, in pieces
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def json_records(
    path: Path, stream: BinaryIO, split: str, *, needs_split: bool = False, setting: str = "data"
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each record of a JSON file; a DataError stands for a line that is
    not valid JSON.

    split, needs_split, setting: see `source_files`. Memory: one record, except for a file that is
    one object (`{"data": [...]}`, columns). Raises DataError.
    """
    first = _first_line(stream)
    if first is None:
        return
    number, line = first
    if _begins_document(line):
        document = JsonDocument(path, line, number, stream)
        yield from _document_records(path, document, split, needs_split, setting)
        return
    value = _parse_line(line, f"{path} line {number}")
    lines = ((n, text) for n, text in enumerate(stream, number + 1) if text.strip())
    second = next(lines, None)
    if second is None and isinstance(value, (dict, list)):  # the whole file is one line
        yield from _records_of_tree(value, path, number, split, needs_split, setting)
        return
    if needs_split:
        raise _no_splits(path, split)
    yield f"{path} line {number}", value
    for number, line in itertools.chain([second] if second else [], lines):
        place = f"{path} line {number}"
        yield place, _parse_line(line, place)


def _first_line(stream: BinaryIO) -> tuple[int, bytes] | None:
    """Number and content of the first line that is not blank, without a byte-order mark."""
    for number in itertools.count(1):
        line = stream.readline(MAX_FIRST_LINE_BYTES)
        if not line:
            break
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            return number, line
    return None


def _begins_document(line: bytes) -> bool:
    """Whether the first line begins a value that continues in later lines."""
    if len(line) >= MAX_FIRST_LINE_BYTES - len(BYTE_ORDER_MARK):
        return True
    try:
        json.loads(line.decode().strip())
    except json.JSONDecodeError as error:
        return error.doc.startswith("[") or error.pos >= len(error.doc)
    except (RecursionError, ValueError):
        return False
    return False


def _parse_line(line: bytes, place: str) -> Any:
    """The value of a line, or the DataError that says what is wrong with it."""
    if len(line) > 4 * MAX_RECORD_CHARACTERS:
        return too_large(place, len(line))
    try:
        return json.loads(line.decode().strip())
    except UnicodeDecodeError as error:
        return DataError(
            f"{place} is not UTF-8 ({error.reason}): convert the file", reason="not UTF-8"
        )
    except json.JSONDecodeError as error:
        if error.doc[error.pos :] == ",":
            return DataError(
                f"{place} ends with a comma: remove it, or make the file a list in brackets",
                reason="not JSON",
            )
        return DataError(
            f"{place} is not valid JSON ({error.msg} at column {error.colno}): fix that line",
            reason="not JSON",
        )
    except (RecursionError, ValueError):
        return beyond_limits(place)


def _no_splits(path: Path, split: str) -> DataError:
    return DataError(
        f"data file {path} holds no split {split!r}: name a file for each split instead "
        "(data.source, data.validation, data.test)"
    )


def _document_records(
    path: Path, document: JsonDocument, split: str, needs_split: bool, setting: str
) -> Iterator[tuple[str, Any]]:
    """Records of a list, of one object, or of objects that follow each other."""
    values = document.values()
    first, second = next(values, None), next(values, None)
    if first and second is None and not document.is_list and isinstance(first[1], dict):
        yield from _records_of_tree(first[1], path, first[0], split, needs_split, setting)
        return
    if needs_split:
        raise _no_splits(path, split)
    known = (entry for entry in (first, second) if entry is not None)
    for number, (line, value) in enumerate(itertools.chain(known, values), 1):
        yield (f"{path} record {number}" if document.is_list else f"{path} line {line}"), value


def _records_of_tree(
    tree: Any, path: Path, line: int, split: str, needs_split: bool, setting: str
) -> Iterator[tuple[str, Any]]:
    """Records of a file that is one list or one object, which begins in `line`."""
    records, has_splits = tree, False
    if isinstance(tree, dict):
        records, has_splits = records_of_object(tree, f"data file {path}", split, setting)
    if needs_split and not has_splits:
        raise _no_splits(path, split)
    if records is None:
        yield f"{path} line {line}", tree
        return
    for number, record in enumerate(records, 1):
        yield f"{path} record {number}", record
