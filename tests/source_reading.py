"""Reading data sources in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.data.sources import read_records
from pocl_ds.errors import DataError

CONTAINERS = Path(__file__).parent / "unit" / "data" / "files" / "containers"
RECORDS = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(6)]


def read(source: Any, **options: Any) -> list[Any]:
    return [record for _, record in read_records(source, **options)]


def places(source: Any, **options: Any) -> list[str]:
    return [place.rpartition("/")[2] for place, _ in read_records(source, **options)]


def read_error(source: Any, **options: Any) -> str:
    """The message of the first fault, raised or in place of a record."""
    with pytest.raises(DataError) as caught:
        for _, record in read_records(source, **options):
            if isinstance(record, DataError):
                raise record
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
