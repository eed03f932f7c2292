"""Adapters alone are trained, on two ranks, tiny models: what is written is a plain model, a run
that stops ends in it too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import pocl
from safetensors.torch import load_file
from tiny_runs import computed, records, stop_after, write_recipe
from transformers import AutoModelForCausalLM

from pocl_ds.workflow.run_dir import RunDirectory, read_models

pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 16, "targets": "q_proj,down_proj"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def only_targets_differ(one: Path, other: Path) -> None:
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        differing == {name for name in before if "q_proj" in name or "down_proj" in name}
        and len(differing) == 4
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its plan, its student healed by adapters first, which are merged and made anew in
    training.
    """
    folder = tmp_path_factory.mktemp("lora")
    teacher = tiny_models.llama(folder / "teacher", layers=3)
    student = tiny_models.llama(folder / "student", layers=2, seed=1)
    recipe = write_recipe(
        folder,
        teacher,
        student,
        max_train_samples=32,
        student={"lora": LORA, "heal_steps": 2},
        rank={"strategy": "random"},
        curriculum={"num_subsets": 2, "epochs_per_stage": 1, "sft_ratio": [0, 0]},
        train={"lr": 1e-2},
        loss={"name": "jsd"},
        policy={
            "name": "gkd",
            "lmbda": 0.7,
            "max_new_tokens": 6,
            "rollout_backend": "transformers",
        },
    )
    for stage in ("preprocess", "init-student", "rank", "plan"):
        pocl(stage, str(recipe), "--run-dir", str(folder / "run"))
    return folder / "run"


def test_what_is_written_is_a_plain_model_and_a_stop_changes_nothing(
    planned: Path, tmp_path: Path
) -> None:
    """Responses come from a writer with merged weights, whose probabilities are compared with the
    student's at each step.
    """
    initial = Path(read_models(RunDirectory(planned))["student"])
    only_targets_differ(planned.parent / "student", initial)
    run, stopped, fewer = (
        Path(shutil.copytree(planned, tmp_path / name)) for name in ("run", "stopped", "fewer")
    )
    said = pocl("train", "--run-dir", str(run)).stderr
    assert "million parameters are trained (rank 4, sft_ratio 16, on q_proj, down_proj)" in said
    final, steps = run / "train" / "final", records(run)
    assert len(steps) == 6 and 0 < sum(record["on_policy"] for record in steps) < 6
    only_targets_differ(initial, final)
    _, found = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = json.loads((run / "train" / "manifest.json").read_text())["info"][
        "trained_parameters"
    ]
    assert trained == 4 * 2 * ((64 + 64) + (128 + 64))

    assert stop_after(stopped, 3) < 6
    shutil.copytree(stopped / "train", fewer / "train")
    pocl("train", "--run-dir", str(stopped))
    assert computed(stopped) == computed(run)
    assert (stopped / "train/final/model.safetensors").read_bytes() == (
        final / "model.safetensors"
    ).read_bytes()

    said = pocl("train", "--run-dir", str(fewer), "launch.ranks=1").stderr
    assert "was written by 2 ranks" in said
    for ours, theirs in zip(computed(fewer), computed(run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_every_rank_waits_for_the_student_that_one_prunes(tmp_path: Path) -> None:
    teacher = tiny_models.llama(tmp_path / "teacher", layers=3)
    student = tiny_models.llama(tmp_path / "student", layers=2, seed=1)
    recipe = write_recipe(
        tmp_path,
        teacher,
        student,
        max_train_samples=32,
        student={"lora": LORA, "prune": {"drop_layers": "1"}, "heal_steps": 1},
    )
    for stage in ("preprocess", "init-student"):
        pocl(stage, str(recipe), "--run-dir", str(tmp_path / "run"))
    healed = read_models(RunDirectory(tmp_path / "run"))["student"]
    assert AutoModelForCausalLM.from_pretrained(healed).config.num_hidden_layers == 1
