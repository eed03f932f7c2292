"""A teacher on its own ranks, with tiny models: the training is the one that it would be with
the teacher on the student's ranks, and no rank outlives the others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import pocl, start
from safetensors.torch import load_file, save_file
from tiny_runs import computed, records, stop_after, write_recipe

OWN = "teacher.placement=own_ranks"
GKD = (
    "policy.name=gkd",
    "policy.lmbda=0.7",
    "policy.rollout_backend=transformers",
    "curriculum.sft_ratio=[0,0]",
    "loss.name=jsd",
)
VALUES = ("validation_loss", "validation_kd_loss")


def plan(folder: Path, *words: str, without: str | None = None) -> Path:
    """A run up to its plan, of 18 optimizer steps. without: a tensor that the teacher lacks."""
    recipe = write_recipe(
        folder,
        tiny_models.llama(folder / "teacher", layers=3, tied=False, seed=1),
        tiny_models.llama(folder / "student", layers=2),
        max_train_samples=32,
        ranking={"strategy": "random"},
        curriculum={"num_subsets": 2, "epochs_per_stage": 3},
    )
    samples = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    with (folder / "data.jsonl").open("w") as stream:
        for number, sample in enumerate(samples):
            stream.write(json.dumps({**sample, "kind": "math" if number % 3 else "chat"}) + "\n")
    if without:
        weights = folder / "teacher" / "model.safetensors"
        tensors = load_file(weights)
        del tensors[without]
        save_file(tensors, weights, metadata={"format": "pt"})
    for step in ("preprocess", "init-student", "rank", "plan"):
        pocl(step, str(recipe), "--run-dir", str(folder / "run"), *words)
    return folder / "run"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan(tmp_path_factory.mktemp("planned"))


def train(planned: Path, run: Path, *words: str) -> Path:
    shutil.copytree(planned, run)
    pocl("train", "--run-dir", str(run), *words)
    return run


def assert_equal_trainings(one: Path, other: Path) -> None:
    assert len(records(one)) == len(records(other)) > 3
    for a, b in zip(computed(one), computed(other), strict=True):
        assert a.pop("sample_ids_digest") == b.pop("sample_ids_digest")
        assert a == pytest.approx(b, rel=1e-5)
    validations = [records(run, kind="validation") for run in (one, other)]
    for a, b in zip(*validations, strict=True):
        assert [a[name] for name in VALUES] == pytest.approx([b[name] for name in VALUES], rel=1e-5)
    weights = [load_file(run / "train" / "final" / "model.safetensors") for run in (one, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6)


def test_two_ranks_of_the_student_and_one_of_the_teacher(planned: Path, tmp_path: Path) -> None:
    own = train(planned, tmp_path / "own", OWN)
    assert_equal_trainings(own, train(planned, tmp_path / "shared"))
    assert "rank 2 runs the teacher: ranks=1" in (own / "logs" / "rank-2.log").read_text()
    shown = pocl("train", "--run-dir", str(planned), OWN, "--dry-run").stdout
    assert "on 2 ranks, and the teacher on 1 of its own" in shown


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("words", "teacher_ranks"),
    [
        (GKD, 2),
        ((), 3),
        (("train.layout=padded", "loss.fused=false"), 2),
        (("train.engine=torch",), 2),
    ],
)
def test_one_rank_of_the_student_and_more_of_the_teacher(
    words: tuple[str, ...], teacher_ranks: int, tmp_path: Path
) -> None:
    """With micro-batches that do not fill the teacher's ranks evenly."""
    words = ("launch.ranks=1", "train.micro_batch_size=8", *words)
    planned = plan(tmp_path, *words)
    own = train(planned, tmp_path / "own", *words, OWN, f"teacher.ranks={teacher_ranks}")
    assert_equal_trainings(own, train(planned, tmp_path / "shared", *words))


@pytest.mark.weekly
@pytest.mark.parametrize(
    "words",
    [
        ("teacher.by_stage={{2: {{model: {other}}}}}",),
        ("teacher.ensemble=[{{model: {other}, weight: 2}}]",),
        ("loss.name=uld",),
        (*GKD, "loss.name=uld"),
        (
            "curriculum.rescoring={{difficulty: loss_ratio, from_stage: 1, shards: 3, share: 0.5}}",
            "teacher.by_domain={{math: {{model: {other}}}}}",
            "data.fields.domain=kind",
        ),
    ],
)
def test_everything_that_asks_the_teacher(words: tuple[str, ...], tmp_path: Path) -> None:
    other = tiny_models.llama(tmp_path / "other", layers=2, tied=False, seed=5)
    words = tuple(word.format(other=other) for word in words)
    planned = plan(tmp_path, *words)
    own = train(planned, tmp_path / "own", *words, OWN, "teacher.ranks=2")
    assert_equal_trainings(own, train(planned, tmp_path / "shared", *words))


@pytest.mark.weekly
def test_healing_and_the_baseline(tmp_path: Path) -> None:
    runs = []
    for name, placement in (("own", [OWN]), ("shared", [])):
        (tmp_path / name).mkdir()
        words = ("student.heal_steps=25", "baseline.enabled=true", *placement)
        runs.append(plan(tmp_path / name, *words))
        pocl("baseline", "--run-dir", str(runs[-1]), *placement)
    for training in ("models/heal", "baseline"):
        own, shared = (computed(run, training) for run in runs)
        assert len(own) > 10
        for a, b in zip(own, shared, strict=True):
            assert a.pop("sample_ids_digest") == b.pop("sample_ids_digest")
            assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.weekly
def test_a_stopped_training_continues_with_either_placement(planned: Path, tmp_path: Path) -> None:
    stopped = Path(shutil.copytree(planned, tmp_path / "stopped"))
    assert 0 < stop_after(stopped, 2, OWN) < len(records(train(planned, tmp_path / "whole")))
    again = Path(shutil.copytree(stopped, tmp_path / "again"))
    for run, placement in ((stopped, OWN), (again, "teacher.placement=with_student")):
        pocl("train", "--run-dir", str(run), placement)
        assert_equal_trainings(run, tmp_path / "whole")


def ranks_of(run: Path) -> dict[int, int]:
    """Process of each rank of a run, by the launcher's numbers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None and str(run).encode() in arguments and b"train" in arguments:
            found[int(rank)] = int(folder.name)
    return found


def wait_for_end(processes: dict[int, int]) -> Iterator[int]:
    """The ranks that have not ended within ten seconds."""
    deadline = time.monotonic() + 10
    for rank, process in processes.items():
        while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if Path(f"/proc/{process}").exists():
            yield rank


@pytest.mark.weekly
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_rank_that_is_killed_ends_the_job(victim: int, planned: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(planned, tmp_path / "run"))
    process = start("train", "--run-dir", str(run), OWN, "teacher.ranks=2")
    metrics = run / "train" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    ranks = ranks_of(run)
    assert sorted(ranks) == [0, 1, 2, 3]
    os.kill(ranks[victim], signal.SIGKILL)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 137, errors[-3000:]
    assert time.monotonic() - begin < 60
    assert f"rank {victim} failed first, with exit code 137" in errors or victim == 0
    assert list(wait_for_end(ranks)) == []
    # The same command continues.
    pocl("train", "--run-dir", str(run), OWN, "teacher.ranks=2")
    assert_equal_trainings(run, train(planned, tmp_path / "whole"))


@pytest.mark.weekly
def test_a_teacher_that_cannot_be_loaded_ends_the_job_with_its_sentence(tmp_path: Path) -> None:
    run = plan(tmp_path, without="model.layers.1.mlp.up_proj.weight")
    result = pocl("train", "--run-dir", str(run), OWN, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    # The student says so, or the launcher if the student was still loading.
    assert re.search(r"rank 2(, which runs the teacher, ended: | failed first)", result.stderr)
    assert "up_proj" in result.stderr
