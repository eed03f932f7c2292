"""Records of tables: .csv, .tsv, .parquet, .arrow, folders of `save_to_disk`, and the Hub."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pocl_ds.data.arrow_values import without_nulls
from pocl_ds.data.source_files import choose_split
from pocl_ds.errors import DataError

ROWS_PER_BATCH = 1024
MAX_CELL_CHARACTERS = (1 << 31) - 1
ARROW_FILE_MAGIC = b"ARROW1"


def csv_records(path: Path, stream: BinaryIO, *, is_tsv: bool) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each row of a .csv or .tsv file; a DataError stands for a row that
    cannot be read.

    Every value is the text of its cell: the reader of pyarrow and that of `datasets` would turn
    `007` into a number and `NA` into a missing value. Raises DataError for an unusable header.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)  # of the whole process; the default is 128 KiB
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    first_line = text.readline()
    separator = "\t" if is_tsv else ","
    if separator not in first_line:  # spreadsheets of many countries write semicolons
        separator = max(separator + ";,\t", key=first_line.count)
    rows = csv.reader(itertools.chain([first_line], text), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path} line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            problem = DataError(
                f"{place}: the row cannot be read ({error}): fix its quotation marks",
                reason="not CSV",
            )
            if header is None:
                raise problem from None
            yield place, problem
            continue
        if row is None:
            return
        if not row:  # a blank line
            continue
        if header is None:
            header = _check_header(row, place)
        elif len(row) != len(header):
            yield (
                place,
                DataError(
                    f"{place}: the row has {len(row)} cells, and the header {len(header)}: quote "
                    "cells that contain a separator or a line break",
                    reason="not CSV",
                ),
            )
        else:
            yield place, dict(zip(header, row, strict=True))


def _check_header(names: list[str], place: str) -> list[str]:
    names = [name.strip() for name in names]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{place}: the header has {name!r} twice: rename a column")
    return names


def parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each row of a Parquet file, in the memory of a batch of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered(path, _batch_rows(file.iter_batches(ROWS_PER_BATCH)))
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"data file {path} is not a Parquet file ({reason}): check it") from None


def arrow_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each row of an Arrow file: a stream, as `datasets` writes it, or
    the file format.
    """
    import datasets
    import pyarrow as pa

    try:
        with path.open("rb") as stream:
            is_file_format = stream.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
        if is_file_format:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
                batches = map(file.get_batch, range(file.num_record_batches))
                yield from _numbered(path, _batch_rows(batches))
        else:
            yield from _numbered(path, _dataset_rows(datasets.Dataset.from_file(str(path))))
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"data file {path} is not an Arrow file ({reason}): check it") from None


def saved_records(
    folder: Path, split: str, *, needs_split: bool, setting: str
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each row of a dataset that `save_to_disk` wrote.

    split, needs_split, setting: see `source_files`. Raises DataError.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files raise many types
        raise DataError(
            f"data folder {folder} cannot be loaded ({_describe(error)}): write it again with "
            "save_to_disk"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        owner = f"data folder {folder}"
        dataset = dataset[choose_split(list(map(str, dataset)), split, owner, setting)]
    elif needs_split:
        raise DataError(
            f"data folder {folder} holds one split, and {split!r} is wanted of it: name a folder "
            "for each split instead (data.source, data.validation, data.test)"
        )
    yield from _numbered(folder, _dataset_rows(dataset))


def hub_records(
    name: str, subset: str | None, split: str, revision: str | None, *, streaming: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each row of a dataset on the Hub.

    streaming: read it as it downloads, without a copy on disk. Raises DataError.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(
            name, subset, split=split, revision=revision, streaming=streaming
        )
        for number, record in enumerate(_dataset_rows(dataset), 1):
            yield f"{name} record {number}", record
    except Exception as error:  # the library raises many unrelated types
        raise DataError(
            f"data set {name!r} (subset {subset}, split {split!r}, revision {revision or 'main'}) "
            f"cannot be loaded ({_describe(error)}): check the name and the network, or give a "
            ".jsonl file"
        ) from None


def _dataset_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows of a Dataset or IterableDataset as plain values."""
    for batch in dataset.with_format(None).iter(ROWS_PER_BATCH):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield without_nulls(dict(zip(names, values, strict=True)))


def _batch_rows(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Rows of record batches, which may be large, as plain values."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield from map(without_nulls, batch.slice(start, ROWS_PER_BATCH).to_pylist())


def _numbered(path: Path, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(rows, 1):
        yield f"{path} row {number}", record


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
