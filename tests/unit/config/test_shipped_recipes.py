"""Every shipped recipe is valid, and names its hardware and its purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocl_ds.config.ds_config import resolve_student, resolve_teacher
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.config.registry import CROSS_TOKENIZER_LOSSES, LOSSES
from pocl_ds.models.model_paths import base_of_adapter, is_adapter, local_path
from pocl_ds.resources import RECIPES, shipped_names

NAMES = shipped_names(RECIPES)
REQUIRED = {
    "quickstart",
    "gpt2-1.5b-to-0.1b",
    "opt-2.7b-to-350m",
    "opt-6.7b-to-1.3b",
    "llama3.1-8b-to-3.2-1b",
    "qwen2.5-7b-to-0.5b",
    "tinyllama-1gpu",
    "teacher-sft",
}
MEASURED = {
    *("quickstart", "quickstart-teacher"),
    *("smollm2-teacher", "smollm2-study"),
    *("tasks-teacher", "tasks-study"),
}


def test_the_required_recipes_are_shipped() -> None:
    assert set(NAMES) >= REQUIRED


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name.rpartition("/")[2]
    assert recipe.hardware
    assert recipe.description.endswith(".")
    assert "GPU" in recipe.hardware
    if name not in MEASURED:
        assert "not measured" in recipe.hardware

    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(resolved)) == recipe

    ranks, train = recipe.launch.ranks, recipe.train
    student = resolve_student(
        recipe.student.ds_config, train=train, dtype=recipe.student.dtype, ranks=ranks
    )
    assert student["train_batch_size"] == train.micro_batch_size * ranks
    if recipe.teacher:
        config = recipe.teacher
        teacher = resolve_teacher(
            config.ds_config,
            dtype=config.dtype,
            ranks=ranks,
            micro_batch_size=train.micro_batch_size,
        )
        assert (teacher is None) == (ranks == 1)
        assert teacher is None or teacher["zero_optimization"]["stage"] == 3


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    recipe = load_recipe("gpt2-1.5b-to-0.1b")
    assert (
        recipe.curriculum.num_subsets,
        recipe.curriculum.epochs_per_stage,
        recipe.curriculum.scheduler,
    ) == (
        4,
        8,
        "baby_step",
    )
    assert (recipe.curriculum.temperature, recipe.curriculum.sft_ratio) == ((1.0, 2.0), (0.3, 0.0))
    assert (recipe.ranking.strategy, recipe.ranking.k) == ("fusion", 60)
    train = recipe.train
    assert (train.batch_size, train.lr, train.min_lr, train.weight_decay, train.max_grad_norm) == (
        64,
        1e-4,
        1e-7,
        0.01,
        1.0,
    )
    assert (train.lr_restart, train.warmup_steps) == ("per_stage", 0)
    assert (recipe.prompt.template, recipe.prompt.max_prompt_tokens, recipe.prompt.max_length) == (
        "alpaca",
        256,
        512,
    )
    assert recipe.evaluate.seeds == (10, 20, 30, 40, 50)


def test_every_registered_loss_has_a_function() -> None:
    losses = pytest.importorskip("pocl_ds.losses")
    import torch

    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for name in set(LOSSES) - {"sft", *CROSS_TOKENIZER_LOSSES}:
        value = losses.divergence(name, logits, logits.clone(), reduction="none", **LOSSES[name])
        assert value.shape == (2,)
        assert value.abs().max() < 1e-6


def test_the_teacher_of_the_quickstart_is_shipped() -> None:
    """Its adapter is the one that the recipe quickstart-teacher trains."""
    recipe, made_by = load_recipe("quickstart"), load_recipe("quickstart-teacher")
    assert recipe.teacher and made_by.student.lora
    assert recipe.teacher.model == recipe.student.model
    folder = local_path(recipe.teacher.model)
    assert is_adapter(folder) and base_of_adapter(folder) == (made_by.student.model, None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (
        made_by.student.lora.r,
        made_by.student.lora.alpha,
    )
    assert {*config["target_modules"]} == {*made_by.student.lora.target_modules}
    assert recipe.prompt == made_by.prompt
