"""A sample of the training references, equal in every process that reads the same data folder."""

from __future__ import annotations

import numpy as np

from pocl_ds.data.conversation import read_sample_file
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
    rows = set(select_by_hash(np.load(path, mmap_mode="r"), NUM_SAMPLES))
    samples = read_sample_file(run.data / "train.jsonl", rows)
    return [text for sample in samples for text in sample.references]
