"""The source of each sample of a mixture (`data.sources`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import read_json, save_array, write_json

NAMES_FILE = "sources.json"  # names of the sources, in the order of their numbers


@dataclass(frozen=True)
class SplitSources:
    """The sources of a split's samples, by row.

    Args:
        names: of the sources of the mixture.
        numbers: place of each sample's source among the names, [samples].
    """

    names: tuple[str, ...]
    numbers: NDArray[np.uint16]

    def name_of(self, row: int) -> str:
        """The name of the source of a sample."""
        return self.names[int(self.numbers[row])]

    def rows_of(self, name: str) -> NDArray[np.int64]:
        """Ascending rows of the samples of one source."""
        return np.flatnonzero(self.numbers == self.names.index(name))

    def write(self, folder: Path, split: str) -> None:
        """Write the sources of a split to its data folder."""
        with _numbers_file(folder, split).open("wb") as stream:
            save_array(stream, self.numbers)
        write_json(folder / NAMES_FILE, list(self.names))


def read_split_sources(folder: Path, split: str) -> SplitSources | None:
    """The sources of a split in a data folder; None if the data is no mixture.

    Raises ArtifactError if a file is damaged.
    """
    path = folder / NAMES_FILE
    if not path.is_file():
        return None
    names: Sequence[str] = read_json(path)
    try:
        numbers = np.load(_numbers_file(folder, split), mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{_numbers_file(folder, split)} is damaged ({error}): remove {folder} and run "
            "`pocl preprocess` again"
        ) from None
    return SplitSources(tuple(names), numbers)


def _numbers_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.sources.npy"
