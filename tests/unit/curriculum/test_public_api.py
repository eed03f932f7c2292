"""The curriculum by its public names: plain lists and arrays, without a run directory and torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import pocl_ds.curriculum as curriculum
from pocl_ds.curriculum import (
    Sampler,
    assign_micro_batches,
    build_plan,
    learning_rate,
    rank_by_difficulty,
    stage_values,
    tied_fraction,
)


def test_from_scores_to_the_batches_of_a_training_run() -> None:
    ids = [f"s{i}" for i in range(12)]
    ranking = rank_by_difficulty(np.linspace(1, 0, 12), np.linspace(0.5, 3, 12), ids)
    assert ranking.ordered_ids == ids and ranking.order.tolist() == list(range(12))
    plan = build_plan(ranking.order, num_subsets=3, epochs_per_stage=2, batch_size=4)
    assert [stage.temperature for stage in plan.stages] == stage_values(3, (1.0, 2.0))
    sampler = Sampler(plan, seed=1)
    for step in range(plan.total_steps):
        position = sampler.position(step)
        stage = plan.stages[position.stage]
        batch = sampler.batch(step)
        assert len(batch) == 4 and batch.max() < stage.stop
        micro_batches = assign_micro_batches(
            np.arange(4), ranks=2, micro_batch_size=1, micro_batch_tokens=None, packed=False
        )
        assert sorted(
            int(i) for rank in micro_batches for micro_batch in rank for i in micro_batch
        ) == [0, 1, 2, 3]
        assert 0 < learning_rate(step, plan.total_steps, lr=1.0, min_lr=0.1) <= 1


def test_samples_without_ids_are_numbered() -> None:
    rouge, entropy = [0.1, 0.9, 0.1] * 5, [2.0, 1.0, 2.0] * 5
    ranking = rank_by_difficulty(rouge, entropy)
    named = rank_by_difficulty(rouge, entropy, [f"{i:02d}" for i in range(15)])
    assert ranking.order.tolist() == named.order.tolist()  # ties in the order of the input
    assert (
        rank_by_difficulty(rouge, entropy, reverse=True).order.tolist()
        == (ranking.order.tolist()[::-1])
    )
    assert tied_fraction(rouge) == 1.0


def test_every_public_name_exists() -> None:
    assert [name for name in curriculum.__all__ if not hasattr(curriculum, name)] == []


@pytest.mark.parametrize("heavy", ["torch", "transformers", "pydantic", "scipy"])
def test_the_import_is_light(heavy: str) -> None:
    code = f"import sys, pocl_ds.curriculum; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
