"""A sample of the training references, equal in every process that reads the same data folder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pocl_ds.data.conversation import Sample
from pocl_ds.errors import ArtifactError
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.workflow.run_dir import RunDirectory

NUM_SAMPLES = 1000


def sample_training_references(run: RunDirectory) -> list[str]:
    """The references of up to NUM_SAMPLES training samples, chosen by the hashes of their ids.

    Raises ArtifactError if the training split is missing or damaged.
    """
    path = run.data / "train.ids.npy"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run `pocl preprocess` first")
    rows = select_by_hash(np.load(path, mmap_mode="r"), NUM_SAMPLES)
    return [text for sample in _samples_of_rows(run, rows) for text in sample.references]


def _samples_of_rows(run: RunDirectory, rows: list[int]) -> Iterator[Sample]:
    """The samples of some rows of data/train.jsonl; only their lines are parsed."""
    path, wanted = run.data / "train.jsonl", set(rows)
    with path.open(encoding="utf-8") as stream:
        for row, line in enumerate(stream):
            if row in wanted:
                try:
                    sample = Sample.from_json(line)
                except (ValueError, KeyError, TypeError):
                    raise ArtifactError(
                        f"{path} line {row + 1} is damaged: run `pocl preprocess` again"
                    ) from None
                yield sample
