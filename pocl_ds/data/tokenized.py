"""Tokenized splits: samples become token ids on disk once, and are read back as memory maps.

Lengths and the mask of the tokens that train are stored, so the padding id may equal EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ArtifactError

TOKENS_PER_BLOCK = 1 << 22  # searched together
SPLIT_FILES = ("ids.npy", "index.npy", "tokens.bin", "loss_mask.bin")
INDEX_COLUMNS = 4  # start, prompt tokens, total tokens, loss tokens of each sample


class TokenizedSplit:
    """A tokenized split on disk, memory-mapped (a `TokenizedDataset`).

    Row i of every array is line i of the split's jsonl file.
    """

    def __init__(self, directory: Path, split: str) -> None:
        """Raises ArtifactError if a file is missing or damaged."""
        paths = [directory / f"{split}.{part}" for part in SPLIT_FILES]
        for path in paths:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: run `pocl preprocess` first")
        try:
            self.ids: NDArray[np.bytes_] = np.load(paths[0], mmap_mode="r")
            index = np.load(paths[1], mmap_mode="r")
            self.starts, self.prompt_tokens, self.total_tokens, self._loss_tokens = (
                index[:, column] for column in range(INDEX_COLUMNS)
            )
            self._tokens: NDArray[np.uint32] = _map_file(paths[2], np.uint32)
            self._loss_mask: NDArray[np.bool_] = _map_file(paths[3], np.bool_)
            expected = int(self.starts[-1] + self.total_tokens[-1]) if len(index) else 0
            for values in (self._tokens, self._loss_mask):
                if len(values) != expected:
                    raise ValueError(f"{len(values)} tokens instead of {expected}")
        except (ValueError, IndexError, EOFError) as error:
            raise ArtifactError(
                f"{directory}/{split}.* is damaged ({error}): remove {directory} and run its step "
                "again"
            ) from None
        self._rows_by_id: NDArray[np.int64] | None = None
        self.name, self._path = split, f"{directory}/{split}"

    @classmethod
    def open(cls, directory: Path, split: str) -> TokenizedSplit:
        """Open the split `train`, `validation` or `test` of a data directory.

        Raises ArtifactError if it is missing or damaged.
        """
        return cls(directory, split)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """See `TokenizedDataset`."""
        return self._loss_tokens

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """See `TokenizedDataset`."""
        start = int(self.starts[row])
        return self._tokens[start : start + int(self.total_tokens[row])]

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        """See `TokenizedDataset`."""
        start = int(self.starts[row])
        return self._loss_mask[start : start + int(self.total_tokens[row])]

    def prompt_source(self, row: int) -> tuple[str, int]:
        """See `TokenizedDataset`."""
        return self.name, row

    def find_disallowed_token(
        self,
        allowed: NDArray[np.bool_],
        *,
        prompts: NDArray[np.bool_],
        rows: NDArray[np.int64] | None = None,
    ) -> tuple[int, int] | None:
        """Row and id of the first token that is not `allowed` [vocabulary], None if there is none.

        Tokens without a loss may also be the ids in `prompts` [vocabulary]. rows: search only
        these.
        """
        for start in range(0, len(self._tokens), TOKENS_PER_BLOCK):
            tokens = np.asarray(self._tokens[start : start + TOKENS_PER_BLOCK])
            in_vocabulary, clipped = tokens < len(allowed), np.minimum(tokens, len(allowed) - 1)
            for place in np.flatnonzero(~(in_vocabulary & allowed[clipped])):
                row = int(np.searchsorted(self.starts, start + place, side="right")) - 1
                if rows is not None and row not in rows:
                    continue
                trains = bool(self._loss_mask[start + place])
                if trains or not (in_vocabulary[place] and prompts[clipped[place]]):
                    return row, int(tokens[place])
        return None

    def rows_of(self, ids: Sequence[str] | NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Rows of these sample ids: [ids]. Raises ArtifactError for an id that the split lacks."""
        keys = (
            ids
            if isinstance(ids, np.ndarray)
            else np.array([name.encode() for name in ids], dtype="S")
        )
        if not len(keys):
            return np.empty(0, np.int64)
        if self._rows_by_id is None:
            self._rows_by_id = np.argsort(self.ids, kind="stable")
        if not len(self):
            missing = np.ones(len(keys), bool)
        else:
            places = np.searchsorted(self.ids, keys, sorter=self._rows_by_id)
            rows = self._rows_by_id[np.minimum(places, len(self) - 1)]
            missing = self.ids[rows] != keys
        if missing.any():
            raise ArtifactError(
                f"sample {keys[int(np.argmax(missing))].decode()} is not in {self._path}: run its "
                f"step again"
            )
        return rows


def shard_rows(samples: int, shard: int, shards: int) -> range:
    """Consecutive rows of a split in one shard; the sizes of shards differ by at most one."""
    return range(shard * samples // shards, (shard + 1) * samples // shards)


def _map_file(path: Path, dtype: Any) -> Any:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")
