"""A shard of the teacher cache: some rows of a split in one file, its checksums, and its manifest.

The place of a row of hidden states in its shard follows from the tokenized split. A row of records
is compressed (`record_rows`), and its shard has a table of lengths.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.tokenized import TokenizedSplit, shard_rows
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.teachers.record_rows import compress_row, decompress_row, row_capacity
from pocl_ds.workflow.files import explain_disk_errors, save_array
from pocl_ds.workflow.manifest import Manifest, damaged_files, read_manifest, write_manifest

STEP = "cache-teacher"
LENGTH_BYTES = 4  # before a compressed row, until the shard is complete
HALF_PRECISION = (torch.bfloat16, torch.float16)
# numpy has no bfloat16: both half precisions are stored as integers with the same bits.
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.int16),
    "float16": np.dtype(np.int16),
    "uint8": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class CacheShard:
    """Some rows of a split in one file, an array [loss tokens of all rows, width].

    rows: ascending, [rows].
    """

    directory: Path
    split: str
    number: int
    count: int
    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]  # first token of each row in the file, and the end: [rows + 1]
    width: int
    dtype: str
    codec: RecordCodec | None = None  # of records, whose rows are compressed

    @classmethod
    def for_split(
        cls,
        directory: Path,
        split: TokenizedSplit,
        rows: NDArray[np.int64],
        number: int,
        count: int,
        width: int,
        dtype: str,
        codec: RecordCodec | None = None,
    ) -> CacheShard:
        """Shard `number` of `count` of the cached rows of a split, which are ascending."""
        places = shard_rows(len(rows), number, count)
        rows = rows[places.start : places.stop]
        offsets = np.concatenate([[0], np.cumsum(split.loss_tokens[rows])])
        return cls(directory, split.name, number, count, rows, offsets, width, dtype, codec)

    @property
    def name(self) -> str:
        """The common stem of the names of its files."""
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}"

    @property
    def path(self) -> Path:
        """The file of the outputs."""
        return self.directory / f"{self.name}.bin"

    @property
    def checksum_path(self) -> Path:
        """The file of the rows' CRC-32 checksums: uint32 [rows]."""
        return self.directory / f"{self.name}.crc.npy"

    @property
    def manifest_name(self) -> str:
        """The name of its manifest in the directory."""
        return f"{self.name}.manifest.json"

    @property
    def lengths_path(self) -> Path:
        """The file of the lengths of compressed rows in bytes: int64 [rows]."""
        return self.directory / f"{self.name}.lengths.npy"

    @property
    def bytes(self) -> int:
        """Size of the file of the outputs while it is written; records are fewer bytes then."""
        return int(self.places[-1])

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where each row is written, and the end: [rows + 1]. Places depend on sizes alone, so that
        several ranks can write; a compressed row leaves a gap, which `finish` closes.
        """
        if self.codec is None:
            return self.offsets * self.width * STORAGE_DTYPES[self.dtype].itemsize
        sizes = LENGTH_BYTES + row_capacity(self.codec, np.diff(self.offsets))
        return np.concatenate([[0], np.cumsum(sizes)])

    def place(self, row: int) -> int:
        """Index of one of its rows."""
        return int(np.searchsorted(self.rows, row))

    def allocate(self) -> None:
        """Reserve the file's full size, so that a full disk shows before anything is computed.
        Raises ResourceError then.
        """
        self.path.unlink(missing_ok=True)
        try:
            with explain_disk_errors(self.path), self.path.open("wb") as stream:
                if self.bytes:
                    os.posix_fallocate(stream.fileno(), 0, self.bytes)
        except ResourceError:
            self.path.unlink(missing_ok=True)
            raise

    def write(self, descriptor: int, row: int, outputs: Tensor) -> int:
        """Write a row's outputs [loss tokens, width] at their position, and return the checksum of
        their stored form.

        descriptor: of the open file.
        """
        outputs = outputs.detach().to("cpu").contiguous()
        if outputs.dtype in HALF_PRECISION:
            outputs = outputs.view(torch.int16)
        position = int(self.places[self.place(row)])
        if self.codec is None:
            data = outputs.numpy().tobytes()
            _write_at(descriptor, data, position)
        else:
            data = compress_row(self.codec, outputs.numpy())
            _write_at(descriptor, len(data).to_bytes(LENGTH_BYTES, "little") + data, position)
        return zlib.crc32(data)

    def written_checksum(self, descriptor: int, row: int) -> int:
        """What `write` returned for a row, from the file, before `finish`; anything for
        a row that was not written.
        """
        start, end = (int(place) for place in self.places[self.place(row) :][:2])
        if self.codec is not None:
            size = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, start), "little")
            start += LENGTH_BYTES
            end = min(start + size, end)
        return zlib.crc32(os.pread(descriptor, end - start, start))

    def finish(self, checksums: NDArray[np.uint32], fingerprint: str, info: dict[str, Any]) -> None:
        """Write the rows' checksums [rows], after every rank has written its own rows, then the
        manifest, which marks the shard as finished. info: for the manifest.
        """
        files = self._seal(checksums)
        write_manifest(
            self.directory,
            STEP,
            fingerprint,
            name=self.manifest_name,
            files=files,
            info={"samples": len(self.rows), **info},
        )

    def _seal(self, checksums: NDArray[np.uint32]) -> list[Path]:
        """Write the checksums of all rows, after rows of records are moved together. Returns the
        files of the shard.
        """
        files = [self.path, self.checksum_path]
        if self.codec is not None:
            with explain_disk_errors(self.lengths_path), self.lengths_path.open("wb") as stream:
                save_array(stream, self._close_gaps())
            files.append(self.lengths_path)
        with explain_disk_errors(self.checksum_path), self.checksum_path.open("wb") as stream:
            save_array(stream, checksums)
        return files

    def _close_gaps(self) -> NDArray[np.int64]:
        """Move compressed rows to the front of the file, and cut it. Returns their lengths."""
        lengths, end = np.zeros(len(self.rows), np.int64), 0
        with explain_disk_errors(self.path), self.path.open("r+b", buffering=0) as stream:
            for index, place in enumerate(self.places[:-1].tolist()):
                size = os.pread(stream.fileno(), LENGTH_BYTES, place)
                lengths[index] = int.from_bytes(size, "little")
                data = os.pread(stream.fileno(), int(lengths[index]), place + LENGTH_BYTES)
                _write_at(stream.fileno(), data, end)
                end += len(data)
            stream.truncate(end)
            os.fsync(stream.fileno())
        return lengths

    def finished_manifest(self, fingerprint: str) -> Manifest | None:
        """Its manifest, or None if it is unfinished, incomplete or of another teacher or data."""
        manifest = read_manifest(self.directory, self.manifest_name)
        if (
            manifest is None
            or manifest.fingerprint != fingerprint
            or damaged_files(self.directory, manifest, checksums=False)
            or (self.codec is not None and self.lengths_path.name not in manifest.files)
        ):
            return None
        return manifest


def _write_at(descriptor: int, data: bytes, position: int) -> None:
    """Write all bytes: a call may write fewer."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


@dataclass(frozen=True)
class StoredRow:
    """A row of a shard: its stored form, a flat array of bytes, and the checksum of that."""

    shard: CacheShard
    row: int
    data: NDArray[np.uint8]
    checksum: int
    tokens: int

    def decode(self) -> NDArray[Any]:
        """Its outputs [loss tokens, width]. Raises ArtifactError for a damaged record."""
        if self.shard.codec is None:
            return self.data.view(STORAGE_DTYPES[self.shard.dtype]).reshape(-1, self.shard.width)
        try:
            return decompress_row(self.shard.codec, self.data.tobytes(), self.tokens)
        except ValueError as error:
            raise ArtifactError(
                f"{self.shard.path} is damaged at row {self.row} of {self.shard.split} ({error}): "
                f"remove it and its manifest.json, and run `pocl {STEP}`"
            ) from None


class OpenShard:
    """A shard whose file is memory-mapped. lengths: of compressed rows in bytes."""

    def __init__(
        self,
        shard: CacheShard,
        checksums: NDArray[np.uint32],
        lengths: NDArray[np.int64] | None,
    ) -> None:
        self.shard, self.checksums = shard, checksums
        self._starts = shard.places if lengths is None else np.cumsum([0, *lengths])
        size = int(self._starts[-1])
        self._data: NDArray[np.uint8] = (
            np.memmap(shard.path, np.uint8, "r") if size else np.empty(0, np.uint8)
        )

    def row(self, row: int) -> StoredRow:
        """One of its rows."""
        index, shard = self.shard.place(row), self.shard
        data = self._data[self._starts[index] : self._starts[index + 1]]
        tokens = int(shard.offsets[index + 1] - shard.offsets[index])
        return StoredRow(shard, row, data, int(self.checksums[index]), tokens)
