"""Trainings whose ranks share their micro-batches, with tiny models: the results of ranks that do
not, and a resume with or without groups.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import pocl
from safetensors.torch import load_file
from tiny_runs import computed, records, write_recipe

SHARED, ALONE = (f"train.sequence_parallel_size={size}" for size in (2, 1))
VALUES = ("validation_loss", "validation_kd_loss")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its plan, of 12 optimizer steps, with a ranking and weights by stage."""
    folder = tmp_path_factory.mktemp("planned")
    recipe = write_recipe(
        folder,
        tiny_models.llama(folder / "teacher", layers=3, tied=False, seed=1),
        tiny_models.llama(folder / "student", layers=2),
        max_train_samples=32,
        ranking={"strategy": "random"},
        curriculum={
            "num_subsets": 2,
            "epochs_per_stage": 2,
            "rescoring": {"difficulty": "kd_loss", "from_stage": 1},
            "sample_weights": {"name": "loss"},
        },
    )
    for step in ("preprocess", "init-student", "rank", "plan"):
        pocl(step, str(recipe), "--run-dir", str(folder / "run"))
    return folder / "run"


def train(planned: Path, run: Path, *words: str) -> Path:
    if not run.exists():
        shutil.copytree(planned, run)
    pocl("train", "--run-dir", str(run), *words)
    return run


@pytest.fixture(scope="module")
def shared(planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(planned, tmp_path_factory.mktemp("shared") / "run", SHARED)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "train" / "final" / "model.safetensors")


def assert_close_trainings(one: Path, other: Path) -> None:
    assert len(records(one)) == len(records(other)) > 10
    for a, b in zip(computed(one), computed(other), strict=True):
        assert a.pop("sample_ids_digest") == b.pop("sample_ids_digest")
        assert a == pytest.approx(b, rel=2e-5)
    validations = [records(run, kind="validation") for run in (one, other)]
    assert validations[0]
    for a, b in zip(*validations, strict=True):
        assert [a[name] for name in VALUES] == pytest.approx([b[name] for name in VALUES], rel=2e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-4, atol=2e-4)


def resumed(run: Path, target: Path, *words: str) -> Path:
    """A copy of a training that lost everything after its first kept checkpoint, trained again."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "train" / "final")
    (target / "train" / "manifest.json").unlink()
    checkpoints = sorted((target / "train" / "checkpoints").glob("step-*"))
    for newer in checkpoints[1:]:
        shutil.rmtree(newer)
    return train(run, target, *words)


def test_ranks_that_share_micro_batches_give_the_same_result(
    planned: Path, shared: Path, tmp_path: Path
) -> None:
    """Also the rankings and weights of a stage, and the validation."""
    assert_close_trainings(shared, train(planned, tmp_path / "run"))


def test_a_resumed_training_is_the_uninterrupted_one(shared: Path, tmp_path: Path) -> None:
    run = resumed(shared, tmp_path / "run", SHARED)
    assert computed(run) == computed(shared)
    assert all(value.equal(weights(shared)[name]) for name, value in weights(run).items())


@pytest.mark.weekly
@pytest.mark.parametrize("words", [("launch.ranks=1", ALONE), (ALONE,), ("launch.ranks=4", SHARED)])
def test_a_training_resumes_with_other_groups(
    shared: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    assert_close_trainings(resumed(shared, tmp_path / "run", *words), shared)


@pytest.mark.weekly
@pytest.mark.parametrize("mode", ["cached_hidden_states", "cached_topk"])
def test_cached_outputs_are_read_by_position(planned: Path, tmp_path: Path, mode: str) -> None:
    runs = []
    for name, words in (("shared", (SHARED,)), ("alone", ())):
        run = tmp_path / name
        shutil.copytree(planned, run, ignore=shutil.ignore_patterns("ranking", "plan"))
        rescoring = "curriculum.rescoring=null", "curriculum.sample_weights=null"
        words = (f"teacher.mode={mode}", *rescoring, *words)
        for step in ("rank", "plan", "cache-teacher", "train"):
            pocl(step, "--run-dir", str(run), *words)
        runs.append(run)
    assert_close_trainings(*runs)


def test_heads_that_a_group_cannot_divide_are_refused(planned: Path) -> None:
    words = ("launch.ranks=3", "train.sequence_parallel_size=3", "train.batch_size=8")
    process = pocl("train", "--run-dir", str(planned), *words, check=False)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "the llama model has 2: set it to one of 1, 2" in process.stderr
