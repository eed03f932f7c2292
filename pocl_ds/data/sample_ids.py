"""Ids of samples: the record's own, or a hash of its content."""

from __future__ import annotations

import hashlib
from typing import Any

from pocl_ds.data.field_names import is_empty
from pocl_ds.data.key_table import KeyTable
from pocl_ds.errors import DataError

MAX_ID_BYTES = 128
LINE_BITS = 40  # of a number that holds a file and a line


class SampleIds:
    """Gives the samples of a source different ids.

    duplicates: `error`, or `suffix` for `id-1`, `id-2` and so on in the order of the records.
    id_setting: the recipe field that names the id, for messages. Equal content without an id of its
    own always gets suffixes. `renamed` counts the suffixes of ids that records brought.
    """

    def __init__(self, duplicates: str, id_setting: str) -> None:
        self._duplicates, self._id_setting = duplicates, id_setting
        self._places, self._suffixes = KeyTable(), KeyTable()
        self._units: dict[str, int] = {}  # FILE line -> its number, from 1
        self.renamed = 0

    def sample_id(self, value: Any, content: bytes, place: str) -> str:
        """The id of a record. value: its own, or an empty one; content: its content, encoded.

        Raises DataError if its own id is invalid, or occurred before and must not.
        """
        own = not is_empty(value)
        sample_id = _own_id(value, place) if own else hashlib.sha256(content).hexdigest()[:16]
        key = _key(sample_id)
        earlier = self._places.get(key)
        if not earlier:
            self._places.insert(key, self._pack(place))
            return sample_id
        if own and self._duplicates == "error":
            raise DataError(
                f"{place}: id {sample_id!r} also occurs at {self._unpack(earlier)}: make ids "
                "unique, or set data.duplicate_ids=suffix to number them or "
                f"{self._id_setting}=null to ignore them",
                reason="duplicate id",
            )
        # Take the next number that no other id of the source has.
        number = self._suffixes.get(key) + 1
        while self._places.get(_key(f"{sample_id}-{number}")):
            number += 1
        self._suffixes.insert(key, number)
        numbered = _check_length(f"{sample_id}-{number}", place)
        self._places.insert(_key(numbered), self._pack(place))
        self.renamed += own
        return numbered

    def _pack(self, place: str) -> int:
        """A place as a number of 64 bits."""
        unit, _, line = place.rpartition(" ")
        if not line.isdecimal():
            unit, line = place, "0"
        return self._units.setdefault(unit, len(self._units) + 1) << LINE_BITS | int(line)

    def _unpack(self, number: int) -> str:
        index, line = number >> LINE_BITS, number & ((1 << LINE_BITS) - 1)
        unit = next(unit for unit, position in self._units.items() if position == index)
        return f"{unit} {line}" if line else unit


def _key(sample_id: str) -> int:
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big")


def _own_id(value: Any, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(
            f"{place}: an id must be a text or a whole number, found {type(value).__name__}: fix "
            "it or leave it out",
            reason="invalid id",
        )
    return _check_length(str(value), place)


def _check_length(sample_id: str, place: str) -> str:
    try:
        size = len(sample_id.encode())
    except UnicodeEncodeError:
        size = MAX_ID_BYTES + 1
    if size > MAX_ID_BYTES or "\n" in sample_id or "\0" in sample_id:
        raise DataError(
            f"{place}: an id must be at most {MAX_ID_BYTES} bytes of text without line breaks: "
            "shorten it or leave it out",
            reason="invalid id",
        )
    return sample_id
