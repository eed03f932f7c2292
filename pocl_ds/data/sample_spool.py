"""Samples between reading and tokenizing: one file, and a few bytes of memory per sample."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")
UNUSED = len(SPLITS)  # the code of samples that a mixture leaves out


class SampleSpool:
    """Lines of `Sample.to_json` on disk; split, source, domain and hashes of each in memory.

    Rows are numbered in the order of `add`. Memory: 29 bytes per sample.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("w", encoding="utf-8")
        self._splits, self._sources, self._domains = array("B"), array("H"), array("H")
        self._keys, self._selection_keys, self._ties = array("Q"), array("Q"), array("Q")

    def __enter__(self) -> SampleSpool:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._splits)

    def add(
        self, line: str, split: str, source: int, hashes: tuple[int, int, int], domain: int = 0
    ) -> None:
        """Append a sample.

        source, domain: their numbers. hashes: split key, selection key, and a hash of the id.
        """
        self._stream.write(line + "\n")
        self._splits.append(SPLITS.index(split))
        self._sources.append(source)
        self._domains.append(domain)
        for column, value in zip((self._keys, self._selection_keys, self._ties), hashes):
            column.append(value)

    def flush(self) -> None:
        """Write the samples that were added, so that `lines` reads them."""
        self._stream.flush()

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Split keys: [samples]."""
        return np.array(self._keys, np.uint64)

    @property
    def selection_keys(self) -> NDArray[np.uint64]:
        """Keys of limited selections: [samples]."""
        return np.array(self._selection_keys, np.uint64)

    @property
    def ties(self) -> NDArray[np.uint64]:
        """Hashes of the ids: [samples]."""
        return np.array(self._ties, np.uint64)

    @property
    def sources(self) -> NDArray[np.uint16]:
        """Numbers of the sources: [samples]."""
        return np.array(self._sources, np.uint16)

    @property
    def domains(self) -> NDArray[np.uint16]:
        """Numbers of the domains: [samples]."""
        return np.array(self._domains, np.uint16)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Ascending rows of a split."""
        return np.flatnonzero(np.array(self._splits, np.uint8) == SPLITS.index(split))

    def leave_out(self, rows: NDArray[np.int64]) -> None:
        """Remove these rows from their split."""
        for row in rows.tolist():
            self._splits[row] = UNUSED

    def lines(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """The lines of these ascending rows."""
        self.flush()
        selected = np.zeros(len(self), bool)
        selected[rows] = True
        with self.path.open(encoding="utf-8", newline="\n") as stream:
            for line, is_selected in zip(stream, selected.tolist()):
                if is_selected:
                    yield line[:-1]

    def ids(self, start: int) -> Iterator[str]:
        """The ids of the samples from row `start` on."""
        self.flush()
        with self.path.open(encoding="utf-8", newline="\n") as stream:
            for line in islice(stream, start, None):
                yield json.loads(line)["id"]
