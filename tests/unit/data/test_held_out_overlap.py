"""What training shares with held-out data, in bounded memory."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest

from pocl_ds.data import held_out_overlap
from pocl_ds.data.conversation import Sample
from pocl_ds.data.held_out_overlap import find_overlap
from pocl_ds.data.sample_spool import SampleSpool


def long_sample(seed: int) -> Sample:
    source = random.Random(seed)
    words = " ".join(f"w{source.randrange(10_000)}" for _ in range(200))
    return Sample.from_instruction(str(seed), words, "Yes.")


@pytest.mark.parametrize("max_runs", [1 << 24, 500])
def test_long_copies_are_found_also_where_runs_are_sampled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, max_runs: int
) -> None:
    monkeypatch.setattr(held_out_overlap, "MAX_RUNS", max_runs)
    caplog.set_level(logging.INFO, "pocl_ds")
    with SampleSpool(tmp_path / "samples") as spool:
        for seed in range(10):
            spool.add(long_sample(seed).to_json(), "train", 0, (seed, seed, seed))
        for seed in range(8, 14):
            spool.add(long_sample(seed).to_json(), "test", 0, (seed, seed, seed))
        rows = {split: spool.rows(split) for split in ("train", "validation", "test")}
        overlap = find_overlap(
            spool, rows, {"tales": [long_sample(3)]}, near_duplicates=True, num_workers=1
        )
    assert overlap.training_rows.tolist() == [3, 8, 9]
    assert overlap.near_duplicates() == {"train": 3, "validation": 0, "test": 2, "tales": 1}
    assert np.array_equal(overlap.items["test"].near_duplicates, [0, 1])
    assert ("one in 4 runs of words is compared" in caplog.text) == (max_runs == 500)
