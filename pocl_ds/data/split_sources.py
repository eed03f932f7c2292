"""The source of each sample of a mixture (`data.sources`), and its domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import read_json, save_array, write_json

LabelKind: TypeAlias = Literal["sources", "domains"]


@dataclass(frozen=True)
class SplitLabels:
    """A label of each sample of a split, by row: its source or its domain.

    Args:
        names: all labels, in the order of their numbers.
        numbers: place of each sample's label among the names, [samples].
    """

    names: tuple[str, ...]
    numbers: NDArray[np.uint16]

    def name_of(self, row: int) -> str:
        """The label of a sample."""
        return self.names[int(self.numbers[row])]

    def rows_of(self, name: str) -> NDArray[np.int64]:
        """Ascending rows of the samples with one label."""
        return np.flatnonzero(self.numbers == self.names.index(name))

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of samples with each label that occurs."""
        counts = np.bincount(self.numbers, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}

    def write(self, folder: Path, split: str, kind: LabelKind = "sources") -> None:
        """Write the labels of a split to its data folder."""
        with _numbers_file(folder, split, kind).open("wb") as stream:
            save_array(stream, self.numbers)
        write_json(_names_file(folder, kind), list(self.names))


def read_split_sources(folder: Path, split: str) -> SplitLabels | None:
    """The sources of a split in a data folder; None if the data is no mixture.

    Raises ArtifactError if a file is damaged.
    """
    return _read_labels(folder, split, "sources")


def read_split_domains(folder: Path, split: str) -> SplitLabels | None:
    """The domains of a split in a data folder: `data.fields.domain` of each record, else the name
    of its source. None if the data is no mixture and no field holds a domain.

    Raises ArtifactError if a file is damaged.
    """
    return _read_labels(folder, split, "domains")


def _read_labels(folder: Path, split: str, kind: LabelKind) -> SplitLabels | None:
    path = _names_file(folder, kind)
    if not path.is_file():
        return None
    names: Sequence[str] = read_json(path)
    numbers_file = _numbers_file(folder, split, kind)
    try:
        numbers = np.load(numbers_file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{numbers_file} is damaged ({error}): remove {folder} and run `pocl preprocess` again"
        ) from None
    return SplitLabels(tuple(names), numbers)


def _names_file(folder: Path, kind: LabelKind) -> Path:
    return folder / f"{kind}.json"


def _numbers_file(folder: Path, split: str, kind: LabelKind) -> Path:
    return folder / f"{split}.{kind}.npy"
