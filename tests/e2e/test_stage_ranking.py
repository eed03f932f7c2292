"""Rescoring by the student between stages, on two ranks with tiny models: what it computes, and
that stopped, damaged and repeated trainings give the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from command_line import pocl
from tiny_runs import computed, records, stop_after, write_recipe

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.models.load import load_model

STEPS = 18  # epochs of 2 and of 4 steps, 3 of each


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its plan, with rescoring before the first stage."""
    folder = tmp_path_factory.mktemp("rescoring")
    recipe = write_recipe(
        folder,
        tiny_models.llama(folder / "teacher", layers=3),
        tiny_models.llama(folder / "student", layers=2, seed=1),
        max_train_samples=32,
        ranking={"strategy": "random"},
        curriculum={
            "num_subsets": 2,
            "epochs_per_stage": 3,
            "rescoring": {"difficulty": "loss_ratio", "from_stage": 1, "shards": 3, "share": 0.5},
            "sample_weights": {"name": "band", "options": {"hardest": 0.9}},
        },
    )
    for step in ("preprocess", "init-student", "rank", "plan"):
        pocl(step, str(recipe), "--run-dir", str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def trained(planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(planned, tmp_path_factory.mktemp("trained") / "run"))
    pocl("train", "--run-dir", str(run))
    return run


def cross_entropy(model: torch.nn.Module, split: TokenizedSplit, row: int) -> float:
    """Mean over a row's loss tokens, from the model's own logits, in nats."""
    tokens = torch.from_numpy(split.tokens(row).astype(np.int64))
    mask = torch.from_numpy(np.array(split.loss_mask(row)))[1:]
    with torch.no_grad():
        log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return float(-log_probs.gather(1, tokens[1:, None])[:, 0][mask].double().mean())


def test_the_first_stage_is_ranked_by_the_loss_ratio_of_untrained_models(
    planned: Path, trained: Path
) -> None:
    folder = trained / "train" / "stages" / "stage-01"
    table, order = pq.read_table(folder / "scores.parquet"), np.load(folder / "order.npy")
    split = TokenizedSplit.open(trained / "data", "train")
    assert table["id"].to_pylist() == [name.decode() for name in split.ids]
    paths = json.loads((planned / "models" / "models.json").read_text())
    for column, name in (("cross_entropy", "student"), ("teacher_cross_entropy", "teacher")):
        model = load_model(paths[name]).eval()
        expected = [cross_entropy(model, split, row) for row in range(len(split))]
        np.testing.assert_allclose(table[column].to_numpy(), expected, rtol=1e-4)
    ratio = table["cross_entropy"].to_numpy() / table["teacher_cross_entropy"].to_numpy()
    assert order.tolist() == np.argsort(ratio, kind="stable").tolist()
    weights = np.load(folder / "weights.npy")
    assert weights[order].tolist() == [1.0] * 28 + [0.0] * 4  # places 0, 1/31, ...


def test_every_stage_draws_from_its_own_ranking(trained: Path) -> None:
    rankings = records(trained, kind="stage_ranking")
    assert [(r["stage"], r["step"], r["samples"]) for r in rankings] == [(0, 0, 32), (1, 6, 16)]
    assert all(r["seconds"] > 0 and r["left_out"] == 4 for r in rankings)
    steps = records(trained)
    # The plan's optimizer steps stay: 28 samples give 1 batch of the first half, 3 of all.
    stages = json.loads((trained / "plan" / "plan.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages] == [6, 12] and len(steps) == STEPS
    assert [s["stage"] for s in steps] == [0] * 6 + [1] * 12


@pytest.mark.parametrize("step", [pytest.param(6, marks=pytest.mark.weekly), 9])
def test_a_stopped_training_equals_an_uninterrupted_one(
    step: int, planned: Path, trained: Path, tmp_path: Path
) -> None:
    stopped = Path(shutil.copytree(planned, tmp_path / "stopped"))
    assert stop_after(stopped, step) < STEPS
    pocl("train", "--run-dir", str(stopped))
    assert computed(stopped) == computed(trained)
    files = "final/model.safetensors", "stages/stage-02/order.npy", "stages/stage-02/scores.parquet"
    for name in files:
        assert (stopped / "train" / name).read_bytes() == (trained / "train" / name).read_bytes()


@pytest.mark.weekly
def test_weighted_samples_resume_exactly_and_on_one_rank(planned: Path, tmp_path: Path) -> None:
    """Weights by the divergence that each stage begins with."""
    ignore = shutil.ignore_patterns("plan")
    base = Path(shutil.copytree(planned, tmp_path / "base", ignore=ignore))
    pocl("plan", "--run-dir", str(base), "curriculum.sample_weights={name: loss}")
    runs = [Path(shutil.copytree(base, tmp_path / name)) for name in ("a", "b", "c")]
    pocl("train", "--run-dir", str(runs[0]))
    assert stop_after(runs[1], 8) < STEPS
    pocl("train", "--run-dir", str(runs[1]))
    pocl("train", "--run-dir", str(runs[2]), "launch.ranks=1")
    expected = computed(runs[0])
    assert computed(runs[1]) == expected
    for record, other in zip(expected, computed(runs[2]), strict=True):
        assert record["sample_ids_digest"] == other["sample_ids_digest"]
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
    # The total has the weights, its parts have not.
    first = records(runs[0])[0]
    ratio = first["sft_ratio"]
    unweighted = ratio * first["sft_loss"] + (1 - ratio) * first["kd_loss"]
    assert abs(first["loss"] - unweighted) > 1e-3


def test_an_interrupted_ranking_repeats_missing_parts_only(
    planned: Path, trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(planned, tmp_path / "run"))
    stages = Path(shutil.copytree(trained / "train" / "stages", run / "train" / "stages"))
    first = stages / "stage-01"
    for name in ("manifest.json", "order.npy", "shard-00001-of-00003.npy"):
        (first / name).unlink()
    shutil.rmtree(stages / "stage-02")
    process = pocl("train", "--run-dir", str(run))
    assert "the student scores 11 samples in 3 parts" in process.stderr
    assert computed(run) == computed(trained)


def test_a_missing_ranking_of_a_resumed_stage_is_named(
    planned: Path, trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(planned, tmp_path / "run"))
    assert stop_after(run, 9) < STEPS
    shutil.rmtree(run / "train" / "stages")
    process = pocl("train", "--run-dir", str(run), check=False)
    assert process.returncode == 2
    assert "stage-02 is missing or of another training" in process.stderr
    assert "remove the checkpoints after step 6" in process.stderr
