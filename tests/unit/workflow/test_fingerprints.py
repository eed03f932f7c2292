"""What a step's result follows from: a change of it makes another fingerprint, a change of
anything else does not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ds.config.recipe_file import check_recipe, override_recipe
from pocl_ds.difficulty.shards import shard_file, shard_manifest
from pocl_ds.errors import ArtifactError
from pocl_ds.workflow import input_digests
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.input_digests import content_digest
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import record_recipe
from pocl_ds.workflow.steps import STEP_NAMES, STEPS, fingerprints

BASE: dict[str, Any] = {
    "name": "x",
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "launch": {"ranks": 1},
}


def changed(before: list[str], after: list[str]) -> set[str]:
    """Steps whose fingerprints differ between two recipes."""
    one, other = (
        fingerprints(override_recipe(check_recipe(BASE), words)) for words in (before, after)
    )
    return {step for step in STEP_NAMES if one[step] != other[step]}


@pytest.mark.parametrize("strategy", ["fusion", "random"])
@pytest.mark.parametrize(
    "change", ["teacher.model=another", "student.lora={}", "student.dropout=0.5"]
)
def test_a_training_follows_from_its_models_whatever_orders_the_samples(
    strategy: str, change: str
) -> None:
    words = [f"ranking.strategy={strategy}", "baseline.enabled=true"]
    assert {"init-student", "train", "baseline", "evaluate", "export", "report"} <= changed(
        words, [*words, change]
    )


def test_what_a_teacher_writes_follows_from_the_engine() -> None:
    words = ["policy.name=seqkd", "loss.name=sft", "ranking.strategy=random"]
    assert {"generate-teacher", "train"} <= changed(
        words, [*words, "score.generation.backend=transformers"]
    )
    assert changed(words, [*words, "score.generation.max_num_seqs=3"]) == set()


def test_whether_there_is_a_baseline_changes_no_training() -> None:
    assert changed([], ["baseline.enabled=true"]) == {"evaluate", "export", "report"}
    assert "baseline" in changed(
        ["baseline.enabled=true"], ["baseline.enabled=true", "baseline.temperature=2"]
    )


def test_a_file_is_told_by_its_text(tmp_path: Path) -> None:
    """A template and a judge's instructions are files of the user's, which may be edited between
    two calls.
    """
    for name, field, first in (
        ("t.jinja", "prompt.template", "preprocess"),
        ("j.jinja", "evaluate.judge.prompt_template", "evaluate"),
    ):
        path, judge = tmp_path / name, ["evaluate.judge={base_url: 'http://localhost:1', model: m}"]
        found = []
        for text in ("{{ instruction }}", "{{ instruction }}", "Say: {{ instruction }}"):
            path.write_text(text)
            found.append(
                fingerprints(override_recipe(check_recipe(BASE), [*judge, f"{field}={path}"]))[
                    first
                ]
            )
        assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_folder_is_told_by_what_lies_in_it(name: str, tmp_path: Path) -> None:
    """A teacher that is trained again into the same folder is another one."""
    (tmp_path / name).write_text("one")
    for field, steps in (
        ("teacher", {"init-student", "cache-teacher", "generate-teacher"}),
        ("student", {"init-student"}),
    ):
        words = [f"{field}.model={tmp_path}"]
        before = fingerprints(override_recipe(check_recipe(BASE), words))
        (tmp_path / "manifest.json").write_text(field)  # which has times in it
        os.utime(tmp_path / name, ns=(1, 1))
        assert fingerprints(override_recipe(check_recipe(BASE), words)) == before
        (tmp_path / name).write_text(field)
        after = fingerprints(override_recipe(check_recipe(BASE), words))
        assert {step for step in STEP_NAMES if before[step] != after[step]} >= steps | {
            "score",
            "train",
            "evaluate",
        }


def test_a_change_in_the_middle_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(bytes(9 << 20))
    before = content_digest(path)
    with path.open("r+b") as stream:
        stream.seek(5_000_000)
        stream.write(b"x")
    os.utime(path, ns=(1, 1))
    assert content_digest(path) != before
    monkeypatch.setattr(input_digests, "WHOLE", 0)  # of a larger one the ends and blocks
    for place, told in (
        (0, True),
        (path.stat().st_size - 1, True),
        (input_digests.BLOCK + 1, False),
    ):
        monkeypatch.setattr(input_digests, "BLOCKS", 3)
        input_digests._content.cache_clear()
        before = content_digest(path)
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"y")
        input_digests._content.cache_clear()
        assert (content_digest(path) != before) == told


def test_a_plugin_is_told_by_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file, found = tmp_path / "told_plugin.py", []
    for text in ("", "x = 1\n"):
        file.write_text(text)
        found.append(fingerprints(check_recipe({**BASE, "plugins": ["told_plugin"]})))
    assert {step for step in STEP_NAMES if found[0][step] != found[1][step]} >= {
        "score",
        "rank",
        "train",
    }


def test_of_a_ds_config_only_how_numbers_are_kept_counts(tmp_path: Path) -> None:
    words = [f"student.ds_config={tmp_path / 'ds.json'}"]
    found = []
    for more in (
        {},
        {"zero_optimization": {"step": 3}},
        {"data_types": {"grad_accum_dtype": "bf16"}},
    ):
        (tmp_path / "ds.json").write_text(json.dumps(more))
        found.append(fingerprints(override_recipe(check_recipe(BASE), words))["train"])
    assert found[0] == found[1] != found[2]


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    recipe, run = (
        override_recipe(check_recipe(BASE), [f"data.source={tmp_path / 'data.jsonl'}"]),
        RunDirectory(tmp_path / "run"),
    )
    record_recipe(run, recipe)
    run.data.mkdir()
    write_manifest(run.data, "preprocess", fingerprints(recipe)["preprocess"])
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(
        ArtifactError,
        match=f"changed: {tmp_path / 'data.jsonl'} is not there any more, put it back",
    ):
        record_recipe(run, recipe)


def test_what_is_said_of_a_training_goes_with_it(tmp_path: Path) -> None:
    """A training that is done again must not leave the tables of the one before."""
    recipe, run = check_recipe(BASE), RunDirectory(tmp_path / "run")
    for step in STEPS:
        step.directory(run).mkdir(parents=True)
        write_manifest(step.directory(run), step.name, fingerprints(recipe)[step.name])
    assert all(
        finished_steps(run, recipe)[name] for name in ("train", "evaluate", "export", "report")
    )
    (run.train / "manifest.json").unlink()
    done = finished_steps(run, recipe)
    assert done["plan"] and not any(
        done[name] for name in ("train", "evaluate", "export", "report")
    )


def test_finished_scores_are_not_given_up_for_another_recipe(tmp_path: Path) -> None:
    """As any other finished step; shards of a set that is not whole are unfinished work, and may
    be.
    """
    recipe, run = (
        override_recipe(check_recipe(BASE), ["score.shards=2"]),
        RunDirectory(tmp_path / "run"),
    )
    other = override_recipe(recipe, ["score.max_new_tokens=8"])
    record_recipe(run, recipe)
    run.scores.mkdir()
    for shard in range(2):
        record_recipe(run, recipe)
        record_recipe(run, other)
        shard_file(run, shard, 2).write_text("{}\n")
        write_manifest(
            run.scores,
            "score",
            fingerprints(recipe)["score"],
            files=[shard_file(run, shard, 2)],
            name=shard_manifest(run, shard, 2),
        )
    record_recipe(run, override_recipe(recipe, ["score.shards=7", "ranking.k=3"]))
    with pytest.raises(
        ArtifactError,
        match=r"finished step 'score' of another recipe \(changed: .*score\.max_new_tokens",
    ):
        record_recipe(run, other)
    assert yaml.safe_load(run.recipe.read_text())["score"]["max_new_tokens"] == 256
