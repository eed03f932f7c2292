"""JSON values that follow each other in a file, or the elements of a list, one by one."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pocl_ds.errors import DataError

CHUNK_BYTES = 1 << 20
# An error, or the end of a number, so close to the end of what was read may be due to the end.
TRUNCATION_CHARACTERS = 64
WHITE_SPACE = re.compile(r"[ \t\n\r]*")


MAX_RECORD_CHARACTERS = 10_000_000


def beyond_limits(place: str) -> DataError:
    """The error of a record that Python's parser refuses although it is JSON."""
    return DataError(
        f"{place} is nested too deeply or holds too long a number: fix or remove the record",
        reason="not JSON",
    )


def too_large(place: str, size: int) -> DataError:
    """The error of a record whose tokenization would take gigabytes of memory."""
    return DataError(
        f"{place} has {size:,} characters, and a record may have {MAX_RECORD_CHARACTERS:,}: split "
        "it",
        reason="too large",
    )


class JsonDocument:
    """Decodes the values of a document in the memory of one value.

    first_line: what was read of the file, beginning in line `number`. stream: the rest of it.
    `is_list`: whether the document is a list, whose elements are the values; known after the first.
    """

    def __init__(self, path: Path, first_line: bytes, number: int, stream: BinaryIO) -> None:
        self.path, self.is_list = path, False
        self._stream, self._ended = stream, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._buffer, self._position = self._utf8.decode(first_line), 0
        # The line at the position, and where it begins in the buffer (negative: before it).
        self._line, self._line_start = number, 0
        self._decoder = json.JSONDecoder()

    def values(self) -> Iterator[tuple[int, Any]]:
        """Yield each value with the number of the line where it begins.

        Raises DataError for a syntax error, which the rest of a document cannot be read after.
        """
        self.is_list = self._skip_white_space() == "["
        if self.is_list:
            yield from self._elements()
            return
        while self._skip_white_space():
            yield self._decode()
            if self._skip_white_space() == ",":
                raise DataError(
                    f"{self.path} line {self._line} has a comma between two records: remove it, or "
                    "make the file a list in brackets",
                    reason="not JSON",
                )

    def _elements(self) -> Iterator[tuple[int, Any]]:
        self._advance(self._position + 1)
        if self._skip_white_space() != "]":
            yield self._decode()
            while (character := self._skip_white_space()) == ",":
                self._advance(self._position + 1)
                self._skip_white_space()
                yield self._decode()
            if character != "]":
                raise self._syntax_error("Expecting ',' or ']'", self._position)
        self._advance(self._position + 1)
        if self._skip_white_space():
            raise self._syntax_error("Extra data", self._position)

    def _decode(self) -> tuple[int, Any]:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                is_open_text = not self._ended and error.msg.startswith("Unterminated string")
                if not (is_open_text or self._may_go_on(error.pos)):
                    raise self._syntax_error(error.msg, error.pos) from None
            except (RecursionError, ValueError):
                raise beyond_limits(f"{self.path} line {self._line}") from None
            else:
                if not (isinstance(value, (int, float)) and self._may_go_on(end)):
                    line = self._line
                    self._advance(end)
                    return line, value
            self._read_more()

    def _may_go_on(self, position: int) -> bool:
        """Whether what was found at a position may be due to the end of what was read."""
        return not self._ended and position >= len(self._buffer) - TRUNCATION_CHARACTERS

    def _skip_white_space(self) -> str:
        """Move to the next character that is not white space, and return it; empty at the end."""
        while True:
            match = WHITE_SPACE.match(self._buffer, self._position)
            self._advance(match.end() if match else self._position)
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if self._ended:
                return ""
            self._read_more()

    def _advance(self, end: int) -> None:
        if newlines := self._buffer.count("\n", self._position, end):
            self._line += newlines
            self._line_start = self._buffer.rindex("\n", self._position, end) + 1
        self._position = end

    def _read_more(self) -> None:
        """Read as much again as there is, so that a long value is parsed only a few times."""
        remaining = self._buffer[self._position :]
        block = self._stream.read(max(CHUNK_BYTES, len(remaining)))
        self._ended = not block
        self._buffer = remaining + self._utf8.decode(block, final=self._ended)
        self._line_start -= self._position
        self._position = 0

    def _syntax_error(self, problem: str, position: int) -> DataError:
        newlines = self._buffer.count("\n", self._position, position)
        start = self._line_start
        if newlines:
            start = self._buffer.rindex("\n", self._position, position) + 1
        return DataError(
            f"data file {self.path} is not valid JSON ({problem} at line {self._line + newlines} "
            f"column {position - start + 1}): fix it",
            reason="not JSON",
        )
