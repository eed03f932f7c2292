"""What a stage's result follows from: a change of it makes another fingerprint, a change of anything else does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ds.artifacts import RunDirectory, write_manifest
from pocl_ds.difficulty.shards import shard_file, shard_manifest
from pocl_ds.errors import ArtifactError
from pocl_ds.pipeline import NAMES, enter, fingerprints
from pocl_ds.recipe import check_recipe, override_recipe

BASE: dict[str, Any] = {"name": "x", "teacher": {"model": "t"}, "student": {"model": "s"}, "launch": {"ranks": 1}}


def changed(before: list[str], after: list[str]) -> set[str]:
    """Stages whose fingerprints differ between two recipes."""
    one, other = (fingerprints(override_recipe(check_recipe(BASE), words)) for words in (before, after))
    return {stage for stage in NAMES if one[stage] != other[stage]}


@pytest.mark.parametrize("strategy", ["fusion", "random"])
@pytest.mark.parametrize("change", ["teacher.model=another", "student.lora={}", "student.dropout=0.5"])
def test_a_training_follows_from_its_models_whatever_orders_the_samples(strategy: str, change: str) -> None:
    words = [f"rank.strategy={strategy}", "compare.enabled=true"]
    assert {"prepare", "train", "baseline", "evaluate", "export", "report"} <= changed(words, [*words, change])


def test_what_a_teacher_writes_follows_from_the_engine() -> None:
    words = ["policy.name=seqkd", "loss.name=sft", "rank.strategy=random"]
    assert {"respond", "train"} <= changed(words, [*words, "score.generation.backend=transformers"])
    assert changed(words, [*words, "score.generation.max_sequences=3"]) == set()


def test_whether_there_is_a_baseline_changes_no_training() -> None:
    assert changed([], ["compare.enabled=true"]) == {"evaluate", "export", "report"}
    assert "baseline" in changed(["compare.enabled=true"], ["compare.enabled=true", "compare.tau=2"])


def test_a_file_is_told_by_its_text(tmp_path: Path) -> None:
    """A template and a judge's instructions are files of the user's, which may be edited between two calls."""
    for name, field, first in (("t.jinja", "prompt.template", "data"), ("j.jinja", "evaluate.judge.prompt", "evaluate")):
        path, judge = tmp_path / name, ["evaluate.judge={base_url: 'http://localhost:1', model: m}"]
        found = []
        for text in ("{{ instruction }}", "{{ instruction }}", "Say: {{ instruction }}"):
            path.write_text(text)
            found.append(fingerprints(override_recipe(check_recipe(BASE), [*judge, f"{field}={path}"]))[first])
        assert found[0] == found[1] != found[2]


def test_finished_scores_are_not_given_up_for_another_recipe(tmp_path: Path) -> None:
    """As any other finished stage; shards of a set that is not whole are unfinished work, and may be."""
    recipe, run = override_recipe(check_recipe(BASE), ["score.shards=2"]), RunDirectory(tmp_path / "run")
    other = override_recipe(recipe, ["score.max_new_tokens=8"])
    enter(run, recipe)
    run.scores.mkdir()
    for shard in range(2):
        enter(run, recipe)
        enter(run, other)
        shard_file(run, shard, 2).write_text("{}\n")
        write_manifest(run.scores, "score", fingerprints(recipe)["score"], files=[shard_file(run, shard, 2)],
                       name=shard_manifest(run, shard, 2))  # fmt: skip
    enter(run, override_recipe(recipe, ["score.shards=7", "rank.k=3"]))
    with pytest.raises(ArtifactError, match=r"finished stage 'score' of another recipe \(changed: .*score\.max_new_tokens"):
        enter(run, other)
    assert yaml.safe_load(run.recipe.read_text())["score"]["max_new_tokens"] == 256
