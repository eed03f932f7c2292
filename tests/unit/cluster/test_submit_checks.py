"""Checks before a submission: files, caches, arrays, and limits of the partition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.profile import check_profile
from pocl_ds.cluster.submit import Submission
from pocl_ds.cluster.submit_checks import check_submission
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import ArtifactError, PoclError, RecipeError
from pocl_ds.workflow.run_dir import RunDirectory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("model"), layers=1)


def submission(run: Path, model: Any, profile: dict[str, Any], **sections: Any) -> Submission:
    data = run.parent / "data.jsonl"
    data.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    tree = {
        "name": "x",
        "teacher": {"model": str(model)},
        "student": {"model": str(model)},
        "data": {"source": str(data)},
        "score": {"shards": 3},
        **sections,
    }
    fields = {"name": "here", "cpus_per_node": 8, **profile}
    return Submission(
        RunDirectory(run), check_recipe(tree), check_profile(fields, "here"), nodes=None
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"student": {"model": "/nowhere/student"}}, "/nowhere/student does not exist"),
        ({"data": {"source": "/nowhere/data.jsonl"}}, "/nowhere/data.jsonl"),
        ({"prompt": {"template": "/nowhere/t.jinja"}}, "prompt.template: /nowhere/t.jinja does"),
        ({"evaluate": {"benchmark_dir": "/nowhere"}}, "evaluate.benchmark_dir: /nowhere does not"),
        (
            {"ranking": {"scores": "/nowhere/s.parquet", "strategy": "difficulty"}},
            "ranking.scores: /nowhere/s.parquet does not exist here",
        ),
        ({"student": {"model": "org/student"}}, "does not have org/student: run `HF_HOME="),
    ],
)
def test_a_missing_file_is_told_before_the_queue(
    tmp_path: Path, model: Path, sections: dict[str, Any], message: str
) -> None:
    profile = {"environment": {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}}
    check_submission(submission(tmp_path / "run", model, profile))
    with pytest.raises(PoclError, match=message):
        check_submission(submission(tmp_path / "run", model, profile, **sections))
    assert not (tmp_path / "run").exists(), "a check writes nothing"


def test_results_of_another_recipe_are_told_before_the_queue(tmp_path: Path, model: Path) -> None:
    from pocl_ds.workflow.manifest import write_manifest
    from pocl_ds.workflow.run_setup import record_recipe
    from pocl_ds.workflow.steps import fingerprints

    run = RunDirectory(tmp_path / "run")
    first = submission(run.path, model, {})
    run.path.mkdir()
    record_recipe(run, first.recipe)
    run.data.mkdir()
    write_manifest(run.data, "preprocess", fingerprints(first.recipe)["preprocess"], files=[])
    with pytest.raises(ArtifactError, match="finished step 'preprocess' of another recipe"):
        check_submission(submission(run.path, model, {}, prompt={"max_length": 400}))


def test_a_program_submits_a_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pocl_ds

    submitted: list[str] = []
    monkeypatch.setattr(scheduler, "live_jobs", lambda ids: [])
    monkeypatch.setattr(scheduler, "submit", lambda script, _: submitted.append(script) or "7")
    monkeypatch.setattr(scheduler, "release", lambda ids: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text("cpus_per_node: 8\n")
    recipe = submission(tmp_path / "x", model, {}).recipe
    run = tmp_path / "run"
    ids = pocl_ds.submit(recipe, tmp_path / "here.yaml", run, until="rank")
    assert ids == {"init-student": "7", "score": "7", "plan": "7"} and len(submitted) == 3
    with pytest.raises(RecipeError, match="until ranks: there is no such step: did you mean rank"):
        pocl_ds.submit(recipe, tmp_path / "here.yaml", run, until="ranks")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Answers of a controller, as SLURM 22.05 gives them. Returns the commands that it gets."""
    commands: list[tuple[str, ...]] = []

    def answer(*words: str) -> str:
        commands.append(words)
        return answers[words[2]]

    partition = "PartitionName=gpu Default=YES MaxNodes=2 MaxTime=1-00:00:00 MaxMemPerNode=64000"
    answers = {"config": "MaxArraySize            = 3\nMaxJobCount = 9", "partition": partition}
    monkeypatch.setattr(scheduler, "available", lambda: True)
    monkeypatch.setattr(scheduler, "call", answer)
    return commands


def test_an_array_that_is_too_large_is_refused(tmp_path: Path, model: Path, slurm: object) -> None:
    evaluate = {"seeds": [1]}
    check_submission(submission(tmp_path / "a", model, {}, evaluate=evaluate))
    with pytest.raises(RecipeError, match="array of 4 tasks, and this cluster allows 3"):
        shards = {"score": {"shards": 4}}
        check_submission(submission(tmp_path / "b", model, {}, evaluate=evaluate, **shards))


def test_more_than_the_partition_allows_is_told(
    tmp_path: Path,
    model: Path,
    slurm: list[tuple[str, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluate = {"seeds": [1]}
    profile = {"time": "24:00:00", "memory": "62G"}
    check_submission(submission(tmp_path / "a", model, profile, evaluate=evaluate))
    assert "partition gpu allows" not in caplog.text
    profile = {"time": "24:00:01", "memory": "63G"}
    check_submission(submission(tmp_path / "b", model, profile, evaluate=evaluate))
    assert "job train asks for time=24:00:01, and partition gpu allows 1-00:00:00" in caplog.text
    assert "job train asks for memory=63G, and partition gpu allows 64000" in caplog.text
    # The controller is asked once for each partition.
    assert [words[3:] for words in slurm if words[2] == "partition"] == [("--oneliner",)] * 2
    # A job of one core gets a share of that memory.
    assert "job plan asks for memory" not in caplog.text


def test_variables_that_override_the_profile_are_told_and_dropped(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    check_submission(submission(tmp_path / "a", model, {}))
    assert "SBATCH_PARTITION of this shell would override the profile" in caplog.text
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "1$SBATCH_PARTITION"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert scheduler.submit("x.sbatch", []) == "1"
