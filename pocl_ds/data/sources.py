"""Data sources: records of files and of data sets on the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocl_ds.config.data import SourceConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.records import OnInvalid, RecordCounts, samples_from_records
from pocl_ds.errors import DataError

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_samples(
    source: str,
    *,
    format: str = "auto",
    fields: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
    train_on: str = "all_turns",
    duplicate_ids: str = "error",
    hub_subset: str | None = None,
    hub_split: str = "train",
    hub_revision: str | None = None,
    setting: str = "data.fields",
    on_invalid: OnInvalid | None = None,
    counts: RecordCounts | None = None,
) -> Iterator[Sample]:
    """Read samples from a .jsonl, .json or .parquet file, or from a data set on the Hub.

    Arguments: see `samples_from_records`. Raises DataError, which names file, line and remedy.
    """
    records = _source_records(source, hub_subset, hub_split, hub_revision)
    yield from samples_from_records(
        records,
        source,
        format,
        fields,
        setting=setting,
        roles=roles,
        train_on=train_on,
        duplicate_ids=duplicate_ids,
        on_invalid=on_invalid,
        counts=counts,
    )


def read_source_records(
    source: SourceConfig, *, streaming: bool = False, setting: str = "data"
) -> Iterator[tuple[str, Any]]:
    """The (place, record) pairs of one source. Raises DataError."""
    for name in [source.source] if isinstance(source.source, str) else source.source:
        yield from _source_records(name, source.hub_subset, source.hub_split, source.hub_revision)


def _source_records(
    source: str, hub_subset: str | None, hub_split: str, hub_revision: str | None
) -> Iterator[tuple[str, Any]]:
    path = Path(os.path.expanduser(source))
    suffixes = ", ".join(FILE_SUFFIXES)
    if os.path.isdir(path):
        raise DataError(f"data file {source} is a folder: name a {suffixes} file in it")
    if path.suffix in FILE_SUFFIXES:
        return _file_records(path)
    if (exists := os.path.exists(path)) or source.startswith(("/", ".", "~")):
        problem = "has an unknown file type" if exists else "does not exist"
        raise DataError(f"data file {source} {problem}: give a {suffixes} file or a Hub name")
    return _hub_records(source, hub_subset, hub_split, hub_revision)


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    if not os.path.isfile(path):
        problem = "is not a file" if os.path.exists(path) else "does not exist"
        raise DataError(f"data file {path} {problem}: check the path")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty: check that it is the right file")
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path)
        elif path.suffix == ".json":
            yield from _json_records(path)
        else:
            yield from _jsonl_records(path)
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not UTF-8 ({error.reason}): convert it") from None
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror or error}): check it"
        ) from None


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as stream:  # some files begin with a byte-order mark
        for number, line in enumerate(stream, 1):
            if line.strip():
                place = f"{path} line {number}"
                yield place, _parse_json(line.rstrip(), place, "fix that line")


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    remedy = "fix it, or rename it to .jsonl if it holds one record per line"
    tree = _parse_json(path.read_text(encoding="utf-8-sig"), f"data file {path}", remedy)
    if isinstance(tree, dict):  # {"data": [...]} and the like
        lists = [value for value in tree.values() if isinstance(value, list)]
        tree = lists[0] if len(lists) == 1 else None
    if not isinstance(tree, list):
        raise DataError(
            f"data file {path} must hold a list of records: convert it, or use .jsonl for one "
            "record per line"
        )
    for number, record in enumerate(tree, 1):
        yield f"{path} record {number}", record


def _parse_json(text: str, place: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise DataError(
            f"{place} is not valid JSON ({error.msg} at {line}column {error.colno}): {remedy}"
        ) from None
    except (RecursionError, ValueError):
        raise DataError(
            f"{place} is nested too deeply or holds too long a number: fix or remove the record"
        ) from None


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
        dataset = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # the library raises many unrelated types
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data set {name!r} (subset {subset}, split {split!r}, revision {revision or 'main'}) "
            f"cannot be loaded ({type(error).__name__}: {reason}): check the name and the network, "
            "or give a .jsonl file"
        ) from None
    for number, record in enumerate(dataset, 1):
        yield f"{name} record {number}", record
