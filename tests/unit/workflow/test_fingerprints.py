"""A fingerprint changes if and only if something changes that the step's result depends on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ds.config import Recipe
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
    "data": {"source": "d.jsonl"},
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "launch": {"ranks": 1},
}


def changed(before: list[str], after: list[str]) -> set[str]:
    """Steps whose fingerprints differ between two recipes."""
    old, new = (
        fingerprints(override_recipe(check_recipe(BASE), words)) for words in (before, after)
    )
    return {step for step in STEP_NAMES if old[step] != new[step]}


@pytest.mark.parametrize("strategy", ["fusion", "random"])
@pytest.mark.parametrize(
    "change", ["teacher.model=another", "student.lora={}", "student.dropout=0.5"]
)
def test_every_later_step_depends_on_the_models(strategy: str, change: str) -> None:
    words = [f"ranking.strategy={strategy}", "baseline.enabled=true"]
    assert {"init-student", "train", "baseline", "evaluate", "export", "report"} <= changed(
        words, [*words, change]
    )


def test_teacher_responses_depend_on_the_generation_backend() -> None:
    words = ["policy.name=seqkd", "loss.name=sft", "ranking.strategy=random"]
    assert {"generate-teacher", "train"} <= changed(
        words, [*words, "score.generation.backend=transformers"]
    )
    assert changed(words, [*words, "score.generation.max_num_seqs=3"]) == set()


def test_enabling_a_baseline_changes_no_training() -> None:
    assert changed([], ["baseline.enabled=true"]) == {"evaluate", "export", "report"}
    assert "baseline" in changed(
        ["baseline.enabled=true"], ["baseline.enabled=true", "baseline.temperature=2"]
    )


def test_a_fingerprint_covers_the_text_of_templates(tmp_path: Path) -> None:
    """Users edit templates and judge prompts between two calls."""
    for name, field, step in (
        ("t.jinja", "prompt.template", "preprocess"),
        ("j.jinja", "evaluate.judge.prompt_template", "evaluate"),
    ):
        path, judge = tmp_path / name, ["evaluate.judge={base_url: 'http://localhost:1', model: m}"]
        digests = []
        for text in ("{{ instruction }}", "{{ instruction }}", "Say: {{ instruction }}"):
            path.write_text(text)
            digests.append(
                fingerprints(override_recipe(check_recipe(BASE), [*judge, f"{field}={path}"]))[step]
            )
        assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_fingerprint_covers_the_files_of_a_model_folder(name: str, tmp_path: Path) -> None:
    """A teacher that is trained again into the same folder is a different teacher."""
    (tmp_path / name).write_text("one")
    for field, steps in (
        ("teacher", {"init-student", "cache-teacher", "generate-teacher"}),
        ("student", {"init-student"}),
    ):
        words = [f"{field}.model={tmp_path}"]
        before = fingerprints(override_recipe(check_recipe(BASE), words))
        (tmp_path / "manifest.json").write_text(field)  # it contains times
        os.utime(tmp_path / name, ns=(1, 1))
        assert fingerprints(override_recipe(check_recipe(BASE), words)) == before
        (tmp_path / name).write_text(field)
        after = fingerprints(override_recipe(check_recipe(BASE), words))
        assert {step for step in STEP_NAMES if before[step] != after[step]} >= steps | {
            "score",
            "train",
            "evaluate",
        }


def test_a_change_in_the_middle_of_a_large_file_is_detected(
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
    monkeypatch.setattr(input_digests, "FULL_DIGEST_BYTES", 0)  # larger files are sampled
    for place, detected in (
        (0, True),
        (path.stat().st_size - 1, True),
        (input_digests.BLOCK_BYTES + 1, False),
    ):
        monkeypatch.setattr(input_digests, "BLOCK_COUNT", 3)
        input_digests._sampled_digest.cache_clear()
        before = content_digest(path)
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"y")
        input_digests._sampled_digest.cache_clear()
        assert (content_digest(path) != before) == detected


def test_a_fingerprint_covers_the_text_of_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file, digests = tmp_path / "edited_plugin.py", []
    for text in ("", "x = 1\n"):
        file.write_text(text)
        digests.append(fingerprints(check_recipe({**BASE, "plugins": ["edited_plugin"]})))
    assert {step for step in STEP_NAMES if digests[0][step] != digests[1][step]} >= {
        "score",
        "rank",
        "train",
    }


def test_only_numeric_settings_of_a_ds_config_enter_a_fingerprint(tmp_path: Path) -> None:
    words = [f"student.ds_config={tmp_path / 'ds.json'}"]
    digests = []
    for ds_settings in (
        {},
        {"zero_optimization": {"step": 3}},
        {"data_types": {"grad_accum_dtype": "bf16"}},
    ):
        (tmp_path / "ds.json").write_text(json.dumps(ds_settings))
        digests.append(fingerprints(override_recipe(check_recipe(BASE), words))["train"])
    assert digests[0] == digests[1] != digests[2]


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
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
        match=f"changed: {tmp_path / 'data.jsonl'} no longer exists, put it back",
    ):
        record_recipe(run, recipe)


def test_results_that_describe_a_removed_training_are_unfinished(tmp_path: Path) -> None:
    """A repeated training must not leave the tables of the one before."""
    recipe, run = check_recipe(BASE), RunDirectory(tmp_path / "run")
    for step in STEPS:
        step.directory(run).mkdir(parents=True)
        write_manifest(step.directory(run), step.name, fingerprints(recipe)[step.name])
    assert all(
        finished_steps(run, recipe)[name] for name in ("train", "evaluate", "export", "report")
    )
    (run.train / "manifest.json").unlink()
    finished = finished_steps(run, recipe)
    assert finished["plan"] and not any(
        finished[name] for name in ("train", "evaluate", "export", "report")
    )


def test_finished_scores_keep_their_recipe(tmp_path: Path) -> None:
    """An incomplete set of shards counts as unfinished, and another recipe may replace it."""
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


@pytest.mark.parametrize("strategy", ["fusion", "random"])
@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"model": "other"}},
        {"teacher": {"model": "t", "dtype": "bfloat16"}},
        {"student": {"model": "m", "heal_steps": 3}},
    ],
)
def test_a_training_depends_on_its_models_for_every_ranking(
    strategy: str, change: dict[str, Any]
) -> None:
    tree = {
        "name": "r",
        "data": {"source": "d.jsonl"},
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "ranking": {"strategy": strategy},
        "baseline": {"enabled": True},
    }
    old, new = (fingerprints(Recipe.model_validate({**tree, **extra})) for extra in ({}, change))
    for step in ("init-student", "train", "baseline", "evaluate"):
        assert old[step] != new[step], step


def test_an_evaluation_depends_on_the_files_of_its_benchmarks(tmp_path: Path) -> None:
    """Files of a folder count too, but not files that no benchmark names."""
    tree = {
        "name": "r",
        "data": {"source": "d.jsonl"},
        "student": {"model": "m"},
        "loss": {"name": "sft"},
    }
    tree["evaluate"] = {
        "models": ["student"],
        "benchmark_dir": str(tmp_path),
        "benchmarks": ["dolly", "vicuna"],
    }
    recipe = Recipe.model_validate(tree)
    digests = [fingerprints(recipe)["evaluate"]]
    for name, text in (
        ("other.jsonl", "one"),
        ("dolly.jsonl", "one"),
        ("dolly.jsonl", "two"),
        ("dolly.jsonl", "one"),
    ):
        (tmp_path / name).write_text(text)
        digests.append(fingerprints(recipe)["evaluate"])
    assert digests[0] == digests[1] and digests[2] == digests[4] and len(set(digests)) == 3
