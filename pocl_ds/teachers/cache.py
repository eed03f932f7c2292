"""The teacher's outputs at the loss tokens, on disk: its final hidden states, from which its head
computes the distribution at any temperature, or records of its largest or of sampled
probabilities (`losses.record_codec`).

A hidden state is stored in the teacher's dtype, as `width` numbers per token, or in 8 bits
(`quantized_states`); logits would need one per vocabulary entry. The rows of a split that a teacher
is used for are divided into shards, each a range of them (`cache_shard`). Each row has a checksum,
which is verified before its use.

Each teacher has its own folder (`TeacherCache`). The manifest of the step names the folders.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.teachers.cache_shard import (
    HALF_PRECISION,
    STORAGE_DTYPES,
    CacheShard,
    OpenShard,
    StoredRow,
)
from pocl_ds.teachers.codecs import read_codec
from pocl_ds.teachers.quantized_states import QuantizedStates, StateStorage
from pocl_ds.workflow.files import atomic_write, save_array
from pocl_ds.workflow.manifest import read_manifest


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

    def __init__(
        self,
        directory: Path,
        splits: list[TokenizedSplit],
        *,
        fingerprint: str,
        is_copy: bool = False,
    ) -> None:
        """is_copy: whether `directory` is a copy of the cache, which the next start repairs.

        Raises ArtifactError if the cache or one of its shards is missing, or is that of another
        teacher or data.
        """
        self.directory, self._is_copy = directory, is_copy
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
        self._shards: dict[str, list[OpenShard]] = {}
        self._ends: dict[str, NDArray[np.int64]] = {}  # of the shards, as places in `_rows`
        for split in splits:
            self._rows[split.name] = self._read_rows(split.name)
            shards = [
                self._open_shard(split, number, int(manifest.info["shards"]), fingerprint)
                for number in range(int(manifest.info["shards"]))
            ]
            self._shards[split.name] = shards
            self._ends[split.name] = np.cumsum([len(opened.shard.rows) for opened in shards])

    def read(self, split: str, rows: tuple[int, ...], tokens: slice | None = None) -> Tensor:
        """The outputs of some rows, concatenated: [loss tokens, width]. tokens: read only this
        range of them.
        """
        tokens = tokens or slice(0, sys.maxsize)
        parts, start = [], 0
        for row in rows:
            stored = self._read_row(split, row)
            first, last = max(tokens.start - start, 0), min(tokens.stop - start, stored.tokens)
            if first < last:
                parts.append(stored.decode()[first:last])
            start += stored.tokens
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
            stored = self._read_row(split, int(row))
            if zlib.crc32(stored.data.data) != stored.checksum:
                return self._describe_damage(stored)
        return None

    def _open_shard(
        self, split: TokenizedSplit, number: int, count: int, fingerprint: str
    ) -> OpenShard:
        shard = CacheShard.for_split(
            self.directory,
            split,
            self._rows[split.name],
            number,
            count,
            self.width,
            self.dtype,
            self.codec,
        )
        if shard.finished_manifest(fingerprint) is None:
            raise ArtifactError(
                f"{shard.path} is missing or not what `pocl cache-teacher` wrote: remove "
                f"{self.directory}/manifest.json, and run `pocl cache-teacher`, which writes this "
                "shard again"
            )
        lengths = np.load(shard.lengths_path) if self.codec else None
        return OpenShard(shard, np.load(shard.checksum_path), lengths)

    def _describe_damage(self, stored: StoredRow) -> str:
        path, place = stored.shard.path, f"row {stored.row} of {stored.shard.split}"
        if self._is_copy:
            return (
                f"{path} is damaged at {place}: run the same command again, which compares the "
                "copy with the cache and copies it again"
            )
        return (
            f"{path} is damaged at {place}: remove it and {self.directory}/manifest.json, and run "
            "`pocl cache-teacher`, which writes this shard again"
        )

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

    def _read_row(self, split: str, row: int) -> StoredRow:
        """A row as it is stored."""
        place = int(np.searchsorted(self._rows[split], row))
        index = int(np.searchsorted(self._ends[split], place, side="right"))
        return self._shards[split][index].row(row)
