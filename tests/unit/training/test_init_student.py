"""The step init-student: which models the later workflow steps read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from huggingface_hub import constants

from pocl_ds.config import LossConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from pocl_ds.errors import ModelError
from pocl_ds.models.load import load_model, resolve_pinned_model
from pocl_ds.teachers import cache_step
from pocl_ds.training.init_student import init_student
from pocl_ds.workflow.pipeline import run_in_process
from pocl_ds.workflow.run_dir import RunDirectory, read_models


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub, offline, with two revisions of one model."""
    cache = tmp_path / "hub" / "models--org--name"
    for number, (name, revision) in enumerate((("main", "a" * 40), ("step1000", "b" * 40))):
        model = tiny_models.llama(tmp_path / name, layers=1, seed=number)
        shutil.copytree(model, cache / "snapshots" / revision)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_later_steps_read_the_pinned_revision(hub: Path, tmp_path: Path) -> None:
    """Scoring, training and evaluation know only the path: another revision under the same name
    would not be noticed.
    """
    run = RunDirectory(tmp_path / "run")
    student = StudentConfig.model_validate({"model": "org/name", "revision": "step1000"})
    sft = LossConfig(name="sft")
    init_student(
        run,
        student=student,
        teacher=None,
        train=TrainConfig(),
        loss=sft,
        seed=0,
        fingerprint="f",
    )
    student_model = load_model(read_models(run)["student"])
    revision_model = load_model(str(hub / "snapshots" / ("b" * 40)))
    pairs = zip(student_model.parameters(), revision_model.parameters(), strict=True)
    assert all(torch.equal(parameter, expected) for parameter, expected in pairs)
    assert json.loads((run.models / "models.json").read_text())["teacher"] is None


def test_a_missing_revision_is_refused(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"the revision step2000 of org/name cannot be loaded .*: check the name"
    ):
        resolve_pinned_model(
            StudentConfig.model_validate({"model": "org/name", "revision": "step2000"})
        )
    folder = str(hub / "snapshots" / ("a" * 40))
    assert resolve_pinned_model(StudentConfig.model_validate({"model": "org/name"})) == folder, (
        "the newest revision is pinned"
    )
    assert (
        resolve_pinned_model(
            StudentConfig.model_validate({"model": folder, "revision": "step2000"})
        )
        == folder
    )


def test_a_branch_that_moves_during_a_run_does_not_change_the_models(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pocl preprocess` records the revision of each name before weights are downloaded; later
    steps use it.
    """
    source, run = tmp_path / "data.jsonl", RunDirectory(tmp_path / "run")
    source.write_text(
        "".join(
            json.dumps({"instruction": f"Say {i}.", "output": f"{i}"}) + "\n" for i in range(40)
        )
    )
    other = {"model": "org/name", "revision": "step1000"}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "student": {"model": "org/name"},
            "teacher": {**other, "mode": "cached_hidden_states"},
            "data": {"source": str(source)},
            "train": {"batch_size": 4, "micro_batch_size": 4},
            "launch": {"ranks": 1},
        }
    )
    run_in_process("preprocess", recipe, run)
    (hub / "refs" / "main").write_text("b" * 40)
    (hub / "refs" / "step1000").write_text("a" * 40)
    run_in_process("init-student", recipe, run)
    assert [Path(read_models(run)[name]).name for name in ("student", "teacher")] == [
        "a" * 40,
        "b" * 40,
    ]
    sources: list[Any] = []
    monkeypatch.setattr(
        cache_step,
        "cache_teacher",
        lambda run, **arguments: sources.extend((arguments["student"], arguments["teacher"])),
    )
    run_in_process("cache-teacher", recipe, run)
    assert [source.revision for source in sources] == ["a" * 40, "b" * 40]
    with pytest.raises(ModelError, match="the revision step7 of org/name cannot be loaded"):
        run_in_process(
            "preprocess",
            recipe.model_copy(
                update={"student": StudentConfig(model="org/name", revision="step7")}
            ),
            run,
        )


def test_mlps_that_cannot_be_tiled_are_refused_before_a_model_is_loaded(
    tiny_opt: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the student's, and as the teacher's."""
    monkeypatch.setattr("pocl_ds.training.init_student.load_recipe_model", None)
    for student, teacher in ((tiny_opt, tiny_llama), (tiny_llama, tiny_opt)):
        with pytest.raises(ModelError, match="OPTDecoderLayer has no dense MLP of its own"):
            init_student(
                RunDirectory(tmp_path / "run"),
                student=StudentConfig(model=str(student)),
                teacher=TeacherConfig(model=str(teacher)),
                train=TrainConfig(mlp_tile_tokens=64),
                loss=LossConfig(name="fkl"),
                seed=0,
                fingerprint="f",
            )
