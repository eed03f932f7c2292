"""A fingerprint changes if and only if something changes that the step's result depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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


def test_records_of_the_teacher_change_the_training() -> None:
    sampled, top_k = ["teacher.mode=cached_sampled"], ["teacher.mode=cached_topk"]
    for words, change in [
        (sampled, "teacher_cache.num_samples=9"),
        (sampled, "seed=3"),
        (sampled, "curriculum.temperature=[1, 3]"),
        (top_k, "teacher_cache.top_k=9"),
        (sampled, top_k[0]),
        (top_k, "teacher_cache.backend=vllm"),
        (sampled, "teacher.mode=online"),
    ]:
        assert {"cache-teacher", "train"} <= changed(words, [*words, change])
    for words, change in [
        (sampled, "teacher_cache.top_k=9"),
        (sampled, "teacher_cache.shards=9"),
        (top_k, "teacher_cache.num_samples=9"),
        ([], "teacher_cache.num_samples=9"),
    ]:
        assert changed(words, [*words, change]) == set()
    # Hidden states of another backend are written again, but give the same training.
    hidden_states = ["teacher.mode=cached_hidden_states"]
    change = "teacher_cache.backend=vllm"
    assert changed(hidden_states, [*hidden_states, change]) == {"cache-teacher"}
    assert "cache-teacher" not in changed(top_k, [*top_k, "seed=3"])


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


WEIGHTS_AND_CODE = (
    "model.safetensors",
    "pytorch_model.bin",
    "modeling_own.py",
    "trainer_state.json",
)
TOKENIZER_PARTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "qwen.tiktoken",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "tokenization_own.py",
)


@pytest.mark.parametrize("name", [*WEIGHTS_AND_CODE, *TOKENIZER_PARTS])
def test_the_token_ids_depend_on_the_tokenizer_and_not_on_the_weights(
    name: str, tmp_path: Path
) -> None:
    """Weights that are trained again do not make the data tokenize again."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    recipe = override_recipe(check_recipe(BASE), [f"student.model={tmp_path}"])
    digests = []
    for text in ("one", "one", "two"):
        path.write_text(text)
        os.utime(path, ns=(len(digests), len(digests)))
        digests.append(fingerprints(recipe))
    assert digests[0] == digests[1]
    expected = set(STEP_NAMES) - {"generate-teacher"}
    if name in WEIGHTS_AND_CODE:
        expected -= {"preprocess", "cache-teacher"}
    differing = {step for step in STEP_NAMES if digests[1][step] != digests[2][step]}
    assert differing - {"generate-teacher"} == expected
    path.unlink()
    assert fingerprints(recipe)["init-student"] != digests[2]["init-student"]


@pytest.mark.parametrize(
    ("fields", "changes_ids"),
    [
        ({"eos_token_id": [0, 2]}, True),
        ({"model_type": "qwen2"}, True),
        ({"tokenizer_class": "GPT2Tokenizer"}, True),
        ({"hidden_size": 8}, False),
    ],
)
def test_some_fields_of_a_model_configuration_choose_its_tokenizer(
    fields: dict[str, Any], changes_ids: bool, tmp_path: Path
) -> None:
    recipe = override_recipe(check_recipe(BASE), [f"student.model={tmp_path}"])
    digests = []
    for extra in ({}, fields):
        tree = {"model_type": "llama", "eos_token_id": 0, "hidden_size": 4, **extra}
        (tmp_path / "config.json").write_text(json.dumps(tree))
        digests.append(fingerprints(recipe))
    assert (digests[0]["preprocess"] != digests[1]["preprocess"]) == changes_ids
    assert digests[0]["init-student"] != digests[1]["init-student"]
    (tmp_path / "config.json").write_text("[")  # `preprocess` says what is wrong with it
    assert fingerprints(recipe)["preprocess"] not in (digests[0]["preprocess"], None)


def test_the_token_ids_depend_on_a_teacher_that_reads_its_own(tmp_path: Path) -> None:
    """A loss across tokenizers tokenizes the data for the teacher too."""
    recipe = override_recipe(check_recipe(BASE), [f"teacher.model={tmp_path}", "loss.name=uld"])
    digests = []
    for text in ("one", "one", "two"):
        (tmp_path / "tokenizer.json").write_text(text)
        digests.append(fingerprints(recipe)["preprocess"])
    assert digests[0] == digests[1] != digests[2]


def test_a_package_of_models_counts_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = override_recipe(check_recipe(BASE), ["student.model=package://some_models/m.gguf"])
    digests = []
    for version in ("1", "2"):
        monkeypatch.setattr(input_digests.metadata, "version", lambda name, v=version: [name, v])
        digests.append(fingerprints(recipe))
    assert digests[0]["preprocess"] != digests[1]["preprocess"]


@pytest.mark.parametrize("source", ["DIR/*.jsonl", "DIR", "[DIR/a.jsonl, DIR/b.jsonl]"])
def test_every_file_of_a_source_counts(source: str, tmp_path: Path) -> None:
    words = [f"data.source={source.replace('DIR', str(tmp_path))}"]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    before = fingerprints(override_recipe(check_recipe(BASE), words))["preprocess"]
    (tmp_path / "b.jsonl").write_text("[]")
    assert fingerprints(override_recipe(check_recipe(BASE), words))["preprocess"] != before


def test_many_files_of_a_source_share_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of a thousand shards must not take a thousand times as long as one file."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(bytes(4 << 20))
    read = []
    monkeypatch.setattr(input_digests, "FULL_DIGEST_BYTES", 8 << 20)
    monkeypatch.setattr(
        input_digests, "_sampled_digest", lambda *arguments: read.append(arguments[-1])
    )
    for files in (1, 2, 3, 1000):
        content_digest(path, files=files)
    assert read == [None, None, input_digests.BLOCK_COUNT // 3, 2]


def finished_run(recipe: Recipe, path: Path, steps: Sequence[str]) -> RunDirectory:
    """A run directory in which these steps are finished."""
    run = RunDirectory(path)
    record_recipe(run, recipe)
    for step in STEPS:
        if step.name in steps:
            step.directory(run).mkdir(parents=True)
            write_manifest(step.directory(run), step.name, fingerprints(recipe)[step.name])
    return run


@pytest.mark.parametrize(
    ("file", "steps", "change"),
    [
        ("student/chat_template.jinja", ("preprocess",), "the tokenizer or chat template of the "),
        ("student/tokenizer.json", ("preprocess",), "the tokenizer or chat template of the "),
        ("student/tokenizer_config.json", ("init-student",), "the tokenizer or chat template of "),
        ("student/model.safetensors", ("preprocess",), None),
        ("student/model.safetensors", ("preprocess", "init-student"), "the weights or config"),
        ("teacher/chat_template.jinja", ("train",), "the tokenizer or chat template of the teach"),
        ("d.jsonl", ("preprocess",), "the data ("),
        ("judge.jinja", ("train",), None),
    ],
)
def test_the_refusal_names_what_changed(
    file: str, steps: Sequence[str], change: str | None, tmp_path: Path
) -> None:
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
    for name in ("d.jsonl", "judge.jinja", file):
        (tmp_path / name).write_text("one")
    words = [
        f"data.source={tmp_path / 'd.jsonl'}",
        f"student.model={tmp_path / 'student'}",
        f"teacher.model={tmp_path / 'teacher'}",
        "evaluate.judge={base_url: 'http://x', model: m}",
        f"evaluate.judge.prompt_template={tmp_path / 'judge.jinja'}",
    ]
    recipe = override_recipe(check_recipe(BASE), words)
    run = finished_run(recipe, tmp_path / "run", steps)
    record_recipe(run, recipe)
    (tmp_path / file).write_text("two")
    if change is None:
        record_recipe(run, recipe)
        return
    with pytest.raises(ArtifactError) as caught:
        record_recipe(run, recipe)
    assert f"holds the finished step {steps[-1]!r} of another recipe (changed: {change}" in str(
        caught.value
    )
    assert f" ({tmp_path / file}))" in str(caught.value)
    # A changed field is named beside the file, and both can be undone.
    with pytest.raises(ArtifactError, match=r"\(changed: seed, the "):
        record_recipe(run, override_recipe(recipe, ["seed=7"]))
    (tmp_path / file).write_text("one")
    record_recipe(run, recipe)


def test_a_new_file_in_a_model_folder_is_named(tmp_path: Path) -> None:
    """`chat_template.jinja` takes the place of the template in tokenizer_config.json."""
    (tmp_path / "m").mkdir()
    recipe = override_recipe(check_recipe(BASE), [f"student.model={tmp_path / 'm'}"])
    run = finished_run(recipe, tmp_path / "run", ("preprocess",))
    (tmp_path / "m" / "chat_template.jinja").write_text("")
    with pytest.raises(
        ArtifactError, match=r"of the student \(.*/m/chat_template.jinja\)\): choose"
    ):
        record_recipe(run, recipe)
    run.input_digests.write_text("[]")  # of a release without digests
    with pytest.raises(ArtifactError, match=r"\(changed: the version of pocl_ds\): choose another"):
        record_recipe(run, recipe)


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
