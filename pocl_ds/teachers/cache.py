"""The teacher's outputs at the loss tokens, on disk: its final hidden states, from which its head
computes the distribution at any temperature, or records of its largest or of sampled
probabilities (`losses.record_codec`).

A hidden state is stored in the teacher's dtype, as `width` numbers per token, or in 8 bits
(`quantized_states`); logits would need one per vocabulary entry. The rows of a split that a teacher
is used for are divided into shards, each a range of them; the place of a row in its shard follows
from the tokenized split. Each row has a checksum, which is verified before its use.

Each teacher has a folder of its own (`TeacherCache`). The manifest of the step names the folders.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.tokenized import TokenizedSplit, shard_rows
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.teachers.codecs import read_codec
from pocl_ds.teachers.quantized_states import QuantizedStates, StateStorage
from pocl_ds.workflow.files import atomic_write, explain_disk_errors, save_array
from pocl_ds.workflow.manifest import Manifest, damaged_files, read_manifest

STEP = "cache-teacher"
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
    ) -> CacheShard:
        """Shard `number` of `count` of the cached rows of a split, which are ascending."""
        places = shard_rows(len(rows), number, count)
        rows = rows[places.start : places.stop]
        offsets = np.concatenate([[0], np.cumsum(split.loss_tokens[rows])])
        return cls(directory, split.name, number, count, rows, offsets, width, dtype)

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
    def bytes(self) -> int:
        """Size of the file of the outputs."""
        return int(self.offsets[-1]) * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        return self.width * STORAGE_DTYPES[self.dtype].itemsize

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
        """Write a row's outputs [loss tokens, width] at their position, and return their checksum.

        descriptor: of the open file.
        """
        outputs = outputs.detach().to("cpu").contiguous()
        if outputs.dtype in HALF_PRECISION:
            outputs = outputs.view(torch.int16)
        data = remaining = outputs.numpy().tobytes()
        position = int(self.offsets[self.place(row)]) * self._token_bytes
        while remaining:
            written = os.pwrite(descriptor, remaining, position)
            remaining, position = remaining[written:], position + written
        return zlib.crc32(data)

    def finished_manifest(self, fingerprint: str) -> Manifest | None:
        """Its manifest, or None if it is unfinished, incomplete or of another teacher or data."""
        manifest = read_manifest(self.directory, self.manifest_name)
        if (
            manifest is None
            or manifest.fingerprint != fingerprint
            or damaged_files(self.directory, manifest, checksums=False)
        ):
            return None
        return manifest


def missing_cache(directory: Path) -> ArtifactError:
    """The error that a folder has no finished cache, or one of another teacher or data."""
    return ArtifactError(
        f"{directory} holds no complete cache of this teacher and data: run `pocl "
        "cache-teacher`, or set teacher.mode=online"
    )


def write_rows(directory: Path, split: str, rows: NDArray[np.int64]) -> None:
    """Write which rows of a split a cache has: ascending, [rows]."""
    with atomic_write(_rows_path(directory, split), "wb") as stream:
        save_array(stream, rows)


def _rows_path(directory: Path, split: str) -> Path:
    return directory / f"{split}.rows.npy"


class TeacherCache:
    """One teacher's cached outputs of some splits, memory-mapped. Width and dtype come from the
    manifest.
    """

    def __init__(self, directory: Path, splits: list[TokenizedSplit], *, fingerprint: str) -> None:
        """Raises ArtifactError if the cache or one of its shards is missing, or is that of another
        teacher or data.
        """
        self.directory = directory
        manifest = read_manifest(directory)
        if manifest is None or manifest.fingerprint != fingerprint:
            raise missing_cache(directory)
        self.width, self.dtype = int(manifest.info["width"]), str(manifest.info["dtype"])
        fields = manifest.info.get("codec")
        self.codec = read_codec(manifest.info["mode"], fields) if fields else None
        # How hidden states are stored, and their type when they are read.
        self.state_dtype = getattr(torch, manifest.info.get("state_dtype", self.dtype))
        is_quantized = self.codec is None and self.dtype == "uint8"
        quantized = QuantizedStates.load(directory) if is_quantized else None
        self.storage = StateStorage(quantized=quantized)
        self._rows: dict[str, NDArray[np.int64]] = {}
        self._shards: dict[str, list[tuple[CacheShard, NDArray[Any], NDArray[np.uint32]]]] = {}
        self._ends: dict[str, NDArray[np.int64]] = {}  # of the shards, as places in `_rows`
        for split in splits:
            self._rows[split.name] = self._read_rows(split.name)
            shards = [
                self._open_shard(split, number, int(manifest.info["shards"]), fingerprint)
                for number in range(int(manifest.info["shards"]))
            ]
            self._shards[split.name] = shards
            self._ends[split.name] = np.cumsum([len(shard.rows) for shard, _, _ in shards])

    def read(self, split: str, rows: tuple[int, ...]) -> Tensor:
        """The outputs of some rows, concatenated: [loss tokens, width]."""
        parts = [self._read_row(split, row)[0] for row in rows]
        empty = np.empty((0, self.width), STORAGE_DTYPES[self.dtype])
        outputs = torch.from_numpy(np.concatenate(parts) if parts else empty)
        dtype = getattr(torch, self.dtype)
        return outputs.view(dtype) if dtype in HALF_PRECISION else outputs

    def decode(self, outputs: Tensor) -> Tensor:
        """What `read` returned, on any device: hidden states in their own type, or records."""
        return outputs if self.codec else self.storage.decode(outputs, self.state_dtype)

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> str | None:
        """A sentence about the first of these rows that is missing or whose checksum differs, or
        None.
        """
        cached = self._rows[split]
        missing = np.append(cached, -1)[np.searchsorted(cached, rows)] != rows
        if missing.any():
            return (
                f"{self.directory} has no outputs of row {rows[int(np.argmax(missing))]} of "
                f"{split}: remove {self.directory}, and run `pocl cache-teacher`"
            )
        for row in rows:
            outputs, checksum, shard = self._read_row(split, int(row))
            if zlib.crc32(outputs.data) != checksum:
                return (
                    f"{shard.path} is damaged at row {row} of {split}: remove it and "
                    f"{self.directory}/manifest.json, and run `pocl cache-teacher`, which writes "
                    "this shard again"
                )
        return None

    def _open_shard(
        self, split: TokenizedSplit, number: int, count: int, fingerprint: str
    ) -> tuple[CacheShard, NDArray[Any], NDArray[np.uint32]]:
        shard = CacheShard.for_split(
            self.directory,
            split,
            self._rows[split.name],
            number,
            count,
            self.width,
            self.dtype,
        )
        if shard.finished_manifest(fingerprint) is None:
            raise ArtifactError(
                f"{shard.path} is missing or not what `pocl cache-teacher` wrote: remove "
                f"{self.directory}/manifest.json, and run `pocl cache-teacher`, which writes this "
                "shard again"
            )
        dtype = STORAGE_DTYPES[self.dtype]
        outputs: NDArray[Any] = (
            np.memmap(shard.path, dtype, "r") if shard.bytes else np.empty(0, dtype)
        )
        return shard, outputs.reshape(-1, self.width), np.load(shard.checksum_path)

    def _read_rows(self, split: str) -> NDArray[np.int64]:
        path = _rows_path(self.directory, split)
        try:
            rows: NDArray[np.int64] = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(
                f"{path} is missing or damaged ({error}): remove {self.directory}, and run `pocl "
                "cache-teacher`"
            ) from None
        return rows

    def _read_row(self, split: str, row: int) -> tuple[NDArray[Any], int, CacheShard]:
        """A row's outputs [loss tokens, width], their checksum, and the shard that holds them."""
        place = int(np.searchsorted(self._rows[split], row))
        index = int(np.searchsorted(self._ends[split], place, side="right"))
        shard, outputs, checksums = self._shards[split][index]
        index_in_shard = shard.place(row)
        row_outputs = outputs[shard.offsets[index_in_shard] : shard.offsets[index_in_shard + 1]]
        return row_outputs, int(checksums[index_in_shard]), shard
