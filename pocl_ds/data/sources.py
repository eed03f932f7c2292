"""Data sources: (place, record) pairs of files, folders and datasets on the Hub.

A place is `FILE line N`, `FILE row N` or `NAME record N`; its last word is the number.
"""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from pocl_ds.config.data import SourceConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.json_records import json_records
from pocl_ds.data.records import OnInvalid, RecordCounts, samples_from_records
from pocl_ds.data.source_files import data_ending, source_files
from pocl_ds.data.table_records import (
    arrow_records,
    csv_records,
    hub_records,
    parquet_records,
    saved_records,
)
from pocl_ds.errors import DataError

log = logging.getLogger("pocl_ds")

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def read_records(
    source: str | Sequence[str],
    *,
    hub_subset: str | None = None,
    hub_split: str = "train",
    hub_revision: str | None = None,
    streaming: bool = False,
    needs_split: bool = False,
    setting: str = "data",
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each record of a source, in bounded memory.

    source: a file, a list of files, a pattern, a folder, or the name of a dataset on the Hub. A
    record that cannot be parsed comes as a DataError in its place, so that it can be skipped.
    hub_split: also the split of a local file or folder that holds several. needs_split: refuse a
    local source without splits, which is otherwise read whole. streaming: read a dataset of the Hub
    as it downloads. setting: the section of the recipe, for messages.

    Raises DataError, with file and remedy, if a whole file cannot be read.
    """
    files = source_files(source, hub_split, needs_split=needs_split, setting=setting)
    if files is None:
        name = source if isinstance(source, str) else source[0]
        yield from hub_records(name, hub_subset, hub_split, hub_revision, streaming=streaming)
        return
    if len(files) > 1:
        log.info("reading %d files, from %s to %s", len(files), files[0], files[-1])
    # The split of a file below a folder is in its name; that of another is in the file.
    names = [source] if isinstance(source, str) else source
    in_folder = any(os.path.isdir(os.path.expanduser(name)) for name in names)
    for path in files:
        if path.is_dir():
            yield from saved_records(path, hub_split, needs_split=needs_split, setting=setting)
        else:
            yield from _file_records(
                path, hub_split, needs_split=needs_split and not in_folder, setting=setting
            )


def read_source_records(
    source: SourceConfig,
    *,
    streaming: bool = False,
    needs_split: bool = False,
    setting: str = "data",
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each record of a section of the recipe. See `read_records`."""
    return read_records(
        source.source,
        hub_subset=source.hub_subset,
        hub_split=source.hub_split,
        hub_revision=source.hub_revision,
        streaming=streaming,
        needs_split=needs_split,
        setting=setting,
    )


def read_samples(
    source: str | Sequence[str],
    *,
    format: str = "auto",
    fields: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
    train_on: str = "all_turns",
    duplicate_ids: str = "error",
    hub_subset: str | None = None,
    hub_split: str = "train",
    hub_revision: str | None = None,
    streaming: bool = False,
    setting: str = "data.fields",
    on_invalid: OnInvalid | None = None,
    counts: RecordCounts | None = None,
) -> Iterator[Sample]:
    """Read the samples of a source.

    Arguments: see `read_records` and `samples_from_records`. Raises DataError, which names file,
    line and remedy.
    """
    records = read_records(
        source,
        hub_subset=hub_subset,
        hub_split=hub_split,
        hub_revision=hub_revision,
        streaming=streaming,
        setting=setting.rpartition(".")[0],
    )
    return samples_from_records(
        records,
        source if isinstance(source, str) else ", ".join(source),
        format,
        fields,
        setting=setting,
        roles=roles,
        train_on=train_on,
        duplicate_ids=duplicate_ids,
        on_invalid=on_invalid,
        counts=counts,
    )


def _file_records(
    path: Path, split: str, *, needs_split: bool, setting: str
) -> Iterator[tuple[str, Any]]:
    """Records of one data file. Raises DataError if it cannot be read."""
    try:
        if path.stat().st_size == 0:
            raise DataError(f"data file {path} is empty: check that it is the right file")
        ending = data_ending(path)
        if needs_split and ending not in (".json", ".jsonl", ".ndjson"):
            raise DataError(
                f"data file {path} holds no split {split!r}: name a file for each split instead "
                "(data.source, data.validation, data.test)"
            )
        if ending == ".parquet":
            yield from parquet_records(path)
        elif ending == ".arrow":
            yield from arrow_records(path)
        else:
            with _open_text_file(path) as stream:
                if ending in (".csv", ".tsv"):
                    yield from csv_records(path, stream, is_tsv=ending == ".tsv")
                else:
                    yield from json_records(
                        path, stream, split, needs_split=needs_split, setting=setting
                    )
    except UnicodeDecodeError as error:
        line = _undecodable_line(path)
        raise DataError(
            f"data file {path} line {line} is not UTF-8 ({error.reason}): convert it"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"data file {path} cannot be read ({reason}): check it") from None


def _undecodable_line(path: Path) -> int:
    """The first line that is not UTF-8; readers of whole documents do not know it."""
    with _open_text_file(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return number


def _open_text_file(path: Path) -> BinaryIO:
    """A buffered stream of a file's bytes, decompressed. Raises DataError for UTF-16."""
    suffix = path.suffix.lower()
    stream: Any
    if suffix in OPEN:
        stream = OPEN[suffix](path, "rb")
    elif suffix == ".zst":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    else:
        stream = path.open("rb", buffering=0)
    buffered = io.BufferedReader(stream, 1 << 20)
    if buffered.peek(2)[:2] in UTF16_MARKS:
        buffered.close()
        raise DataError(f"data file {path} is not UTF-8 (it is UTF-16): convert it")
    return cast(BinaryIO, buffered)
