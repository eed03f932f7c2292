"""LoRA on two ranks and tiny models: only adapters are trained, the result is a plain model, and a
resumed training gives the same one.
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

from pocl_ds.config import ModelSource
from pocl_ds.models.load import resolve_model
from pocl_ds.workflow.run_dir import RunDirectory, read_models

pytest.importorskip("peft")
LORA = {"r": 4, "alpha": 16, "target_modules": "q_proj,down_proj"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_only_target_modules_differ(old: Path, new: Path) -> None:
    before, after = weights(old), weights(new)
    assert before.keys() == after.keys()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        differing == {name for name in before if "q_proj" in name or "down_proj" in name}
        and len(differing) == 4
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its plan. Adapters heal the student and are merged; training adds new ones."""
    folder = tmp_path_factory.mktemp("lora")
    teacher = tiny_models.llama(folder / "teacher", layers=3)
    student = tiny_models.llama(folder / "student", layers=2, seed=1)
    recipe = write_recipe(
        folder,
        teacher,
        student,
        max_train_samples=32,
        student={"lora": LORA, "heal_steps": 2},
        ranking={"strategy": "random"},
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
    for step in ("preprocess", "init-student", "rank", "plan"):
        pocl(step, str(recipe), "--run-dir", str(folder / "run"))
    return folder / "run"


def test_the_result_is_a_plain_model_and_resuming_changes_nothing(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator with merged weights generates the responses; each optimizer step compares its
    probabilities with the student's.
    """
    initial = Path(read_models(RunDirectory(planned))["student"])
    assert_only_target_modules_differ(planned.parent / "student", initial)
    run, stopped, fewer = (
        Path(shutil.copytree(planned, tmp_path / name)) for name in ("run", "stopped", "fewer")
    )
    log = pocl("train", "--run-dir", str(run)).stderr
    assert "million parameters are trained (r 4, alpha 16, on q_proj, down_proj)" in log
    final, steps = run / "train" / "final", records(run)
    assert len(steps) == 6 and 0 < sum(record["on_policy"] for record in steps) < 6
    assert_only_target_modules_differ(initial, final)
    _, loading = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = json.loads((run / "train" / "manifest.json").read_text())["info"][
        "trainable_parameters"
    ]
    assert trained == 4 * 2 * ((64 + 64) + (128 + 64))
    # The adapter alone is the same model.
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    merged = weights(Path(resolve_model(ModelSource(model=str(run / "train" / "adapter")))))
    torch.testing.assert_close(merged, weights(final), rtol=0, atol=1e-6)

    assert stop_after(stopped, 3) < 6
    shutil.copytree(stopped / "train", fewer / "train")
    pocl("train", "--run-dir", str(stopped))
    assert computed(stopped) == computed(run)
    assert (stopped / "train/final/model.safetensors").read_bytes() == (
        final / "model.safetensors"
    ).read_bytes()

    log = pocl("train", "--run-dir", str(fewer), "launch.ranks=1").stderr
    assert "was written by 2 ranks" in log
    for actual, expected in zip(computed(fewer), computed(run), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_every_rank_waits_until_rank_0_has_pruned_the_student(tmp_path: Path) -> None:
    teacher = tiny_models.llama(tmp_path / "teacher", layers=3)
    student = tiny_models.llama(tmp_path / "student", layers=2, seed=1)
    recipe = write_recipe(
        tmp_path,
        teacher,
        student,
        max_train_samples=32,
        student={"lora": LORA, "prune": {"drop_layers": "1"}, "heal_steps": 1},
    )
    for step in ("preprocess", "init-student"):
        pocl(step, str(recipe), "--run-dir", str(tmp_path / "run"))
    healed = read_models(RunDirectory(tmp_path / "run"))["student"]
    assert AutoModelForCausalLM.from_pretrained(healed).config.num_hidden_layers == 1
