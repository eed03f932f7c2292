"""Records in memory, read as `pocl preprocess` reads those of a file."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.records import RecordCounts, samples_from_records
from pocl_ds.errors import DataError

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
QA = [Message("user", "Q"), Message("assistant", "A")]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def read(*records: Any, **options: Any) -> list[Sample]:
    places = ((f"dir/x.jsonl line {number}", record) for number, record in enumerate(records, 1))
    return list(samples_from_records(places, "dir/x.jsonl", **options))


def read_one(record: Any, **options: Any) -> Sample:
    (sample,) = read(record, **options)
    return sample


def counts_of(*records: Any, **options: Any) -> RecordCounts:
    counts = RecordCounts()
    read(*records, counts=counts, **options)
    return counts


def read_error(*records: Any, reason: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*records, **options)
    message = str(caught.value)
    assert "\n" not in message and caught.value.reason == reason
    return message
