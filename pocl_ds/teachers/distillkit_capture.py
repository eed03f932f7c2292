"""Captures of DistillKit (https://github.com/arcee-ai/DistillKit): a teacher's largest
log-probabilities in Parquet files, beside the `compression_config.yaml` that says how.

A row has `input_ids`, and for each of them but the last, so for the prediction of the next,
`bytepacked_indices` (ids from the most probable one on, `ceil(log2(d))` bits each, from the highest
bit on) and `compressed_logprobs`. Its sampler takes them at temperature 1 over all ids of the
teacher, and appends one token of padding to a sample that is not too long.

Only captures that store every log-probability in at least float32 are read: those are exact, and
the mass of all other ids is what is missing to 1. The files name neither teacher nor tokenizer.

Shapes: n tokens, k stored ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from pyarrow import ArrowException
from torch import Tensor

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.generation.log_prob_checks import log_prob_problem
from pocl_ds.losses.top_k import TopKCodec

CONFIG = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}


@dataclass(frozen=True)
class CaptureConfig:
    """How a capture stores a token: k ids below `size`."""

    size: int
    k: int
    dtype: np.dtype[Any]
    has_deltas: bool

    @classmethod
    def read(cls, folder: Path) -> CaptureConfig:
        """Read the file CONFIG. Raises ArtifactError if it is damaged, or if the capture lost part
        of the log-probabilities.
        """
        path = folder / CONFIG
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            size, k, exact = (int(tree[name]) for name in ("d", "k", "exact_k"))
            dtype = str(tree.get("exact_dtype", "float32"))
            has_deltas = bool(tree.get("delta_encoding", True))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ArtifactError(
                f"{path} is not the configuration of a DistillKit capture "
                f"({type(error).__name__}: {' '.join(str(error).split())}): copy it again"
            ) from None
        if exact < k:
            raise ArtifactError(
                f"{path} has exact_k={exact} of k={k}, so that the other log-probabilities were "
                "replaced by a polynomial or by a few bits: capture again with exact_k equal to k "
                "and exact_dtype float32, or fill the cache with `pocl cache-teacher`"
            )
        if dtype not in DTYPES:
            raise ArtifactError(
                f"{path} has exact_dtype={dtype}, which has rounded the log-probabilities: capture "
                "again with float32, or fill the cache with `pocl cache-teacher`"
            )
        return cls(size, k, DTYPES[dtype], has_deltas)

    def decode(self, logprobs: NDArray[np.uint8], ids: NDArray[np.uint8]) -> tuple[Any, Any]:
        """Log-probabilities [n, k] float64, in descending order, and their ids [n, k] int64."""
        values = np.ascontiguousarray(logprobs).view(self.dtype).astype(np.float64)
        if self.has_deltas:
            values = values.cumsum(-1)
        bits = (self.size - 1).bit_length()
        unpacked = np.unpackbits(ids, axis=-1)[:, : self.k * bits].reshape(-1, self.k, bits)
        return values, unpacked.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a token's log-probabilities and of its ids."""
        return self.k * self.dtype.itemsize, -(-self.k * (self.size - 1).bit_length() // 8)


class DistillKitCapture:
    """A capture as a source of top-k records at temperature 1 (see `OutputSource`)."""

    def __init__(self, folder: Path, codec: TopKCodec, allowed: NDArray[np.bool_]) -> None:
        """allowed: [size], the ids that teacher and student share. Raises ArtifactError if the
        files are damaged, have lost something, or have fewer ids than the codec.
        """
        self.folder, self.codec, self.allowed = folder, codec, allowed
        self.config = CaptureConfig.read(folder)
        if self.config.k < codec.k:
            raise ArtifactError(
                f"{folder} has {self.config.k} ids of each token: set teacher_cache.top_k to "
                f"{self.config.k} or less"
            )
        self._mass, self._tokens = 0.0, 0
        self.filled_tokens = 0  # with fewer than top_k stored ids that take part
        self._splits: dict[str, TokenizedSplit] = {}
        self._rows: dict[bytes, tuple[int, int]] = {}  # tokens -> block and row in it
        self._blocks: list[tuple[Path, int]] = []  # row groups of the files
        self._open: tuple[int, list[dict[str, Any]]] = (-1, [])
        for path in sorted(folder.glob("*.parquet")):
            self._index_file(path)
        if not self._blocks:
            raise ArtifactError(f"{folder} has a {CONFIG} and no Parquet files: copy them too")

    def find(self, split: TokenizedSplit, row: int) -> tuple[int, int, str, int] | None:
        """See `OutputSource`. A sample is found by its tokens up to the last loss token: what
        follows has no influence on the outputs before it.
        """
        self._splits[split.name] = split
        tokens, mask = np.asarray(split.tokens(row)), np.asarray(split.loss_mask(row))
        if mask[:1].any():  # nothing predicts the first token
            return None
        used = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        for length in dict.fromkeys([len(tokens), used]):
            place = self._rows.get(_key(tokens[:length]))
            if place is not None:
                return (*place, split.name, row)
        return None

    def read(self, place: tuple[int, int, str, int]) -> Tensor:
        """See `OutputSource`. Raises ArtifactError for a row that is damaged."""
        block, number, name, row = place
        path, _ = self._blocks[block]
        if self._open[0] != block:
            self._open = block, self._read_block(block, COLUMNS)
        record = self._open[1][number]
        # The prediction of token t is that of position t - 1.
        positions = np.flatnonzero(np.asarray(self._splits[name].loss_mask(row))) - 1
        parts = []
        for column, size in zip(COLUMNS[1:], self.config.row_bytes, strict=True):
            try:
                part = np.array([record[column][p][:size] for p in positions], np.uint8)
                parts.append(part.reshape(len(positions), size))
            except (IndexError, ValueError, OverflowError, TypeError) as error:
                raise _damaged(path, number, f"{column}: {error}") from None
        log_p, ids = self.config.decode(*parts)
        return self._records(path, number, log_p, ids)

    def mean_mass(self) -> float:
        """Mean probability of the ids that the records leave out, of all that was read."""
        return self._mass / max(self._tokens, 1)

    def _records(self, path: Path, number: int, log_p: Any, ids: Any) -> Tensor:
        """Records [n, bytes] of all stored log-probabilities and their ids, [n, k]."""
        if not len(ids):
            return torch.empty(0, self.codec.bytes, dtype=torch.uint8)
        problem = log_prob_problem(ids, log_p)
        if (ids >= self.config.size).any():
            problem = f"an id that is not below the {self.config.size} of {CONFIG}"
        if problem:
            raise _damaged(path, number, f"it has {problem}")
        known = (ids < len(self.allowed)) & self.allowed[np.minimum(ids, len(self.allowed) - 1)]
        records = self.codec.encode_top(
            torch.from_numpy(np.where(known, ids, -1)),
            torch.from_numpy(log_p),
            torch.from_numpy(self.allowed),
        )
        _, stored = self.codec.decode(records, 1.0)
        self._mass += float(stored[:, -1].exp().double().sum())
        self._tokens += len(ids)
        self.filled_tokens += int((known.sum(-1) < self.codec.k).sum())
        return records

    def _index_file(self, path: Path) -> None:
        """Index the rows of a file by their tokens, with and without the last one, which may be
        padding.
        """
        try:
            file = pq.ParquetFile(path)
            names, groups = set(file.schema_arrow.names), file.num_row_groups
        except (ArrowException, OSError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): copy it again") from None
        if "packed_indices" in names:
            raise ArtifactError(
                f"{path} has logits of DistillKit's older format, in float16 and without the mass "
                "of the other ids: capture again, or fill the cache with `pocl cache-teacher`"
            )
        if "attention_mask" in names or not names.issuperset(COLUMNS):
            raise ArtifactError(
                f"{path} has the columns {', '.join(sorted(names))}, and an unpacked capture of "
                f"DistillKit has {', '.join(COLUMNS)}: import the capture as it was written"
            )
        for group in range(groups):
            self._blocks.append((path, group))
            block = len(self._blocks) - 1
            for number, record in enumerate(self._read_block(block, COLUMNS[:1])):
                tokens = np.array(record["input_ids"], np.uint32)
                for length in (len(tokens), len(tokens) - 1):
                    self._rows.setdefault(_key(tokens[:length]), (block, number))

    def _read_block(self, block: int, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        path, group = self._blocks[block]
        try:
            rows: list[dict[str, Any]] = (
                pq.ParquetFile(path).read_row_group(group, list(columns)).to_pylist()
            )
        except (ArrowException, OSError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): copy it again") from None
        return rows


def _damaged(path: Path, number: int, reason: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged at row {number} ({reason}): capture it again")


def _key(tokens: NDArray[Any]) -> bytes:
    return hashlib.sha256(tokens.astype("<u4").tobytes()).digest()
