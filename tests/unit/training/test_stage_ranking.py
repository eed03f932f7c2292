"""The files that the ranking of a stage writes, without a model; tests/e2e has whole trainings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocl_ds.config import LossConfig, RescoringConfig, SampleWeightsConfig
from pocl_ds.curriculum import build_plan
from pocl_ds.curriculum.sample_scores import SampleScores
from pocl_ds.curriculum.stage_files import load_stage, stage_directory
from pocl_ds.training.stage_ranking import StageRanking

SAMPLES = 8


def make_ranking(
    folder: Path, weights: SampleWeightsConfig | None = None, **rescoring: Any
) -> StageRanking:
    ids = [f"s{row}" for row in range(SAMPLES)]
    scores = SampleScores(ids, {"place": np.linspace(0, 1, SAMPLES)})
    plan = build_plan(np.arange(SAMPLES), num_subsets=2, epochs_per_stage=1, batch_size=2)
    unused: Any = None
    parts: Any = SimpleNamespace(plan=plan), SimpleNamespace(directory=folder, write=lambda _: None)
    return StageRanking(
        RescoringConfig(**rescoring),
        weights,
        scores,
        parts[0],
        unused,
        unused,
        LossConfig(),
        parts[1],
        runs_teacher=False,
        fingerprint="f",
    )


def write_stage(ranking: StageRanking, stage: int) -> None:
    """Rank the samples in the reverse order of the data."""
    measured = {"cross_entropy": np.arange(SAMPLES)[::-1].astype(np.float64)}
    position: Any = SimpleNamespace(step=2, stage=stage)
    ranking._write(position, ranking.scores, np.arange(SAMPLES), measured, 1.0)


def test_weights_of_an_earlier_training_are_removed(tmp_path: Path) -> None:
    band = SampleWeightsConfig(name="band", options={"hardest": 0.5})
    write_stage(make_ranking(tmp_path, band), 1)
    plan = make_ranking(tmp_path).sampler.plan
    assert list(load_stage(plan, tmp_path, 1).sample_ids) == [7, 6, 5, 4]
    (stage_directory(tmp_path, 1) / "manifest.json").unlink()
    write_stage(make_ranking(tmp_path), 1)
    assert list(load_stage(plan, tmp_path, 1).sample_ids) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("stage", "count"), [(1, 8), (2, 2), (3, 2)])
def test_all_samples_are_scored_first_then_a_share(stage: int, count: int, tmp_path: Path) -> None:
    ranking = make_ranking(tmp_path, share=0.25)
    rows = ranking._rows_to_score(stage, ranking.scores)
    assert len(rows) == count == ranking.config.samples_to_score(SAMPLES, stage)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert ranking.config.samples_to_score(SAMPLES, 0) == 0
