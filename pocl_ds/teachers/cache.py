"""What the teacher says of each loss position, on disk: its final hidden states, of which its head
makes the same distribution again at any temperature, or with teacher.mode=cached_topk records of its
largest probabilities.

A state is kept in the teacher's compute type: width numbers a token, where logits would be as many
as the vocabulary. A split lies in shards of neighbouring rows; where a row begins follows from the
encoded split. Each row has a checksum, looked at whenever it is read.
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

from pocl_ds.data.tokenized import EncodedSplit, shard_rows
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.workflow.run_dir import Manifest, damaged_files, disk_faults, read_manifest

STAGE = "cache-teacher"
HALVES = (torch.bfloat16, torch.float16)
# numpy has no bfloat16: halves are kept as the integers of their bits.
RAW: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.int16),
    "float16": np.dtype(np.int16),
    "uint8": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class Shard:
    """Neighbouring rows of a split in one file: [loss tokens of all rows, width]."""

    directory: Path
    split: str
    number: int
    count: int
    rows: range
    starts: NDArray[np.int64]  # where each of its rows begins, in tokens; one more for the end
    width: int
    dtype: str

    @classmethod
    def of(
        cls, directory: Path, split: EncodedSplit, number: int, count: int, width: int, dtype: str
    ) -> Shard:
        """Shard `number` of `count`."""
        rows = shard_rows(len(split), number, count)
        tokens = split.loss_tokens[rows.start : rows.stop]
        return cls(
            directory,
            split.name,
            number,
            count,
            rows,
            np.concatenate([[0], np.cumsum(tokens)]),
            width,
            dtype,
        )

    name = property(lambda self: f"{self.split}-{self.number:05d}-of-{self.count:05d}")
    path = property(lambda self: self.directory / f"{self.name}.bin")
    checksums = property(lambda self: self.directory / f"{self.name}.crc.npy")
    manifest = property(lambda self: f"{self.name}.manifest.json")
    bytes = property(lambda self: int(self.starts[-1]) * self.width * RAW[self.dtype].itemsize)

    def allocate(self) -> None:
        """An empty file of the whole size: a full disk shows here, before anything is computed."""
        self.path.unlink(missing_ok=True)
        try:
            with disk_faults(self.path), self.path.open("wb") as stream:
                if self.bytes:
                    os.posix_fallocate(stream.fileno(), 0, self.bytes)
        except ResourceError:
            self.path.unlink(missing_ok=True)
            raise

    def write(self, stream: int, row: int, states: Tensor) -> int:
        """Put a row's states [loss tokens, width] in place, through a file descriptor. Returns
        their checksum.
        """
        kept = states.detach().to("cpu").contiguous()
        data = whole = (kept.view(torch.int16) if kept.dtype in HALVES else kept).numpy().tobytes()
        place = int(self.starts[row - self.rows.start]) * self.width * RAW[self.dtype].itemsize
        while data:
            data, place = data[(done := os.pwrite(stream, data, place)) :], place + done
        return zlib.crc32(whole)

    def sealed(self, fingerprint: str) -> Manifest | None:
        """Its manifest, where it is whole and of this teacher and data."""
        found = read_manifest(self.directory, self.manifest)
        if (
            found is None
            or found.fingerprint != fingerprint
            or damaged_files(self.directory, found, checksums=False)
        ):
            return None
        return found


class TeacherStore:
    """The stored states of some splits, memory-mapped. Their width and type are what the stage's
    manifest says.
    """

    def __init__(self, directory: Path, splits: list[EncodedSplit], *, fingerprint: str) -> None:
        self.directory = directory
        sealed = read_manifest(directory)
        if sealed is None or sealed.fingerprint != fingerprint:
            raise ArtifactError(
                f"{directory} holds no whole cache of this teacher and data: run `pocl cache-teacher`, or "
                f"set "
                "teacher.mode=online"
            )
        self.width, self.dtype = int(sealed.info["width"]), str(sealed.info["dtype"])
        self.top_k: dict[str, Any] | None = sealed.info.get("top_k")
        kind = RAW[self.dtype]
        self._shards: dict[str, list[tuple[Shard, NDArray[Any], NDArray[np.uint32]]]] = {}
        self._first: dict[str, list[int]] = {}
        for split in splits:
            for number in range(count := int(sealed.info["shards"])):
                shard = Shard.of(directory, split, number, count, self.width, self.dtype)
                if shard.sealed(fingerprint) is None:
                    raise ArtifactError(
                        f"{shard.path} is missing, or not what `pocl cache-teacher` wrote: remove "
                        f"{directory}/manifest.json, and run `pocl cache-teacher`, it makes this shard anew"
                    )
                states: NDArray[Any] = (
                    np.memmap(shard.path, kind, "r") if shard.bytes else np.empty(0, kind)
                )
                self._shards.setdefault(split.name, []).append(
                    (shard, states.reshape(-1, self.width), np.load(shard.checksums))
                )
                self._first.setdefault(split.name, []).append(shard.rows.start)

    def read(self, split: str, rows: tuple[int, ...]) -> Tensor:
        """States of some rows, behind one another: [loss tokens, width]."""
        found = [self._row(split, row)[0] for row in rows]
        joined = np.concatenate(found) if found else np.empty((0, self.width), RAW[self.dtype])
        states = torch.from_numpy(joined)
        return states.view(kind) if (kind := getattr(torch, self.dtype)) in HALVES else states

    def fault(self, split: str, rows: NDArray[np.int64]) -> str | None:
        """What is wrong with one of these rows' states, by the first that is not what was written."""
        for row in rows:
            states, checksum, shard = self._row(split, int(row))
            if zlib.crc32(states.data) != checksum:
                return (
                    f"{shard.path} is damaged at row {row} of {split}: remove it and "
                    f"{self.directory}/manifest.json, and run "
                    "`pocl cache-teacher`, it makes this shard anew"
                )
        return None

    def _row(self, split: str, row: int) -> tuple[NDArray[Any], int, Shard]:
        place = int(np.searchsorted(self._first[split], row, side="right")) - 1
        shard, states, checksums = self._shards[split][place]
        inside = row - shard.rows.start
        return (
            states[shard.starts[inside] : shard.starts[inside + 1]],
            int(checksums[inside]),
            shard,
        )
