"""Export: the folder holds the trained weights, and other folders are not changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.config import ExportConfig
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.config.yaml_io import dump_yaml, parse_yaml
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluation import export as export_module
from pocl_ds.evaluation.export import export
from pocl_ds.evaluation.model_card import model_card
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import read_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def test_the_folder_holds_the_trained_model(run: RunDirectory, recipe: str) -> None:
    folder = export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    assert folder.resolve() == run.export.resolve()
    exported, trained = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (folder, run.train / "final")
    )
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[key], trained[key]) for key in exported)
    assert AutoTokenizer.from_pretrained(folder).encode(
        "the number"
    ) == AutoTokenizer.from_pretrained(run.train / "final").encode("the number")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "library_name: transformers" in card
    for word in ("d" * 16, "| 1 | 40 | 1 | 5 |", "fkl", "torch"):
        assert word in card, word
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.step == "export" and manifest.fingerprint == "x"


def test_a_model_with_a_tied_head_is_exported(
    run: RunDirectory, recipe: str, tiny_gpt2: Path
) -> None:
    shutil.rmtree(run.train / "final")
    shutil.copytree(tiny_gpt2, run.train / "final")
    files = [path for path in (run.train / "final").iterdir() if path.is_file()]
    write_manifest(run.train, "train", "t", info={"steps": 5}, files=files)
    folder = export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_finished_export_is_reused(run: RunDirectory, recipe: str) -> None:
    folder = export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert export(run, out=None, recipe_yaml=recipe, fingerprint="x") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    export(run, out=None, recipe_yaml=recipe, fingerprint="y")
    assert read_manifest(folder).fingerprint == "y"  # type: ignore[union-attr]


def test_a_changed_weight_is_an_error_with_its_name(
    run: RunDirectory, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    copyfile = shutil.copyfile

    def copy_and_change(source: Path, target: Path) -> None:
        copyfile(source, target)
        if Path(source).name == "model.safetensors":
            tensors = load_file(target)
            tensors[key][0, 0] += 1e-3
            save_file(tensors, target, metadata={"format": "pt"})

    monkeypatch.setattr(export_module.shutil, "copyfile", copy_and_change)
    with pytest.raises(ArtifactError, match=key.replace(".", r"\.")):
        export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    assert not run.export.exists()
    assert not [path for path in run.path.iterdir() if path.name.startswith(".export")]


def test_unfinished_training_is_one_sentence(run: RunDirectory, recipe: str) -> None:
    (run.train / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"final is missing or unfinished: finish `pocl train`"):
        export(run, out=None, recipe_yaml=recipe, fingerprint="x")


def test_a_folder_with_other_files_is_not_changed(
    run: RunDirectory, recipe: str, tmp_path: Path
) -> None:
    for name, content in (("notes.txt", "mine"), ("manifest.json", '{"name": "an app"}')):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(ArtifactError):
            export(run, out=folder, recipe_yaml=recipe, fingerprint="x")
        assert [path.name for path in folder.iterdir()] == [name] and (
            folder / name
        ).read_text() == content
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ArtifactError):
        export(run, out=file, recipe_yaml=recipe, fingerprint="x")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (export(run, out=empty, recipe_yaml=recipe, fingerprint="x") / "config.json").is_file()


def test_no_text_of_the_recipe_breaks_out_of_the_model_card(run: RunDirectory, recipe: str) -> None:
    """A fence in a description ended the block, and the rest was Markdown of its own."""
    tree = parse_yaml(recipe)
    tree["hardware"] = "one GPU\n```\n# My heading\n````\n"
    tree["student"]["model"] = "a`b"
    card = model_card(run, dump_yaml(tree), 1000)
    blocks = re.findall(r"^(`{3,})yaml\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    assert parse_yaml(blocks[0][1])["hardware"] == tree["hardware"]
    assert "made from ``a`b``" in card


def test_the_model_card_has_no_local_paths(run: RunDirectory, recipe: str) -> None:
    folder = export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    texts = [
        path.read_text(encoding="utf-8")
        for path in folder.iterdir()
        if path.suffix in (".md", ".json")
    ]
    assert not [text for text in texts if "/home/somebody" in text or str(run.path) in text]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "teacher" in card and "data.jsonl" in card


@pytest.mark.parametrize(
    ("overrides", "stages", "expected", "unexpected"),
    [
        (
            [],
            2,
            [
                "distilled from the teacher `T` by progressive",
                "baby_step curriculum by `fusion` difficulty\n",
                "temperature",
            ],
            [],
        ),
        (
            [],
            1,
            ["distilled from the teacher `T` by plain KD.", "no curriculum: one stage"],
            ["POCL", "curriculum-learning"],
        ),
        (
            ["ranking.reverse=true"],
            2,
            ["by a curriculum.", "`fusion` difficulty, hardest first"],
            ["POCL"],
        ),
        (
            ["policy.name=gkd", "curriculum.sft_ratio=[0, 0]"],
            1,
            ["by plain KD, on responses by the policy `gkd`."],
            ["POCL"],
        ),
        (
            ["policy.name=seqkd", "loss.name=sft"],
            1,
            ["fine-tuning on responses of the teacher `T` (policy `seqkd`)."],
            ["temperature"],
        ),
        (
            ["policy.name=mixture", "policy.shares={data: 0.5, teacher: 0.5}", "loss.name=sft"],
            2,
            [
                "on the data's responses and responses of the teacher `T` (policy `mixture` (data "
                "0.5, student 0, teacher 0.5)), with"
            ],
            [],
        ),
        (
            ["teacher.ensemble=[{model: U, weight: 2}]"],
            1,
            ["from the teachers `T` (weight 1) and `U` (weight 2) by plain KD."],
            [],
        ),
        (
            ["teacher=null", "loss.name=sft", "student.heal_steps=0"],
            1,
            ["by supervised fine-tuning; no teacher."],
            ["knowledge-distillation", "temperature"],
        ),
    ],
)
def test_the_model_card_names_the_method(
    overrides: list[str], stages: int, expected: list[str], unexpected: list[str], run: RunDirectory
) -> None:
    stage = {
        "index": 0,
        "start": 0,
        "stop": 40,
        "temperature": 1.0,
        "sft_ratio": 0.3,
        "epochs": 1,
        "steps": 5,
    }
    write_json(
        run.plan / "plan.json",
        {"batch_size": 8, "scheduler": "baby_step", "stages": [stage] * stages},
    )
    words = ["teacher.model=T", "teacher.mode=online", "baseline.enabled=false", *overrides]
    recipe = load_recipe("quickstart", words)
    card = model_card(run, dump_recipe(recipe), 1000).split("## Recipe")[0]
    assert all(text in card for text in expected), card
    assert not any(text in card for text in unexpected), card


def test_the_model_card_says_that_there_were_no_test_samples(
    run: RunDirectory, recipe: str
) -> None:
    results = {"seeds": [1], "footnotes": {}, "models": {"student": {"benchmarks": {}}}}
    card = model_card(run, recipe, 1000)
    assert "## Results\n\nThis model was not evaluated.\n" in card
    write_json(run.evaluation / "results.json", results)
    write_manifest(run.evaluation, "evaluate", "f")
    card = model_card(run, recipe, 1000)
    assert "## Results\n\nThis model was not evaluated: the data had no test samples.\n" in card


def test_a_file_added_to_an_export_is_not_deleted(run: RunDirectory, recipe: str) -> None:
    folder = export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt"):
        export(run, out=None, recipe_yaml=recipe, fingerprint="y")
    assert (folder / "notes.txt").read_text() == "mine"


def test_weights_that_changed_since_training_are_not_exported(
    run: RunDirectory, recipe: str
) -> None:
    path = run.train / "final" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="changed after it was saved"):
        export(run, out=None, recipe_yaml=recipe, fingerprint="x")


def test_a_damaged_export_is_written_again(run: RunDirectory, recipe: str) -> None:
    folder = export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    (folder / "model.safetensors").unlink()
    export(run, out=None, recipe_yaml=recipe, fingerprint="x")
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, key: tensors.pop(key), "is missing from the exported model"),
        (
            lambda tensors, key: tensors.update(more=tensors[key].clone()),
            "weight more is unknown in the exported model",
        ),
        (
            lambda tensors, key: tensors.update({key: tensors[key][1:].clone()}),
            r"has shape \(\d+, \d+\) instead of",
        ),
        (
            lambda tensors, key: tensors.update({key: tensors[key].half()}),
            "is torch.float16 instead of torch.float32",
        ),
    ],
)
def test_each_kind_of_difference_has_its_message(
    change: Callable[..., Any], message: str, run: RunDirectory, tmp_path: Path
) -> None:
    source, key = run.train / "final", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    change(tensors, key)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        export_module.check_weights(source, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        export_module.check_weights(source, tmp_path)


def test_weights_that_do_not_match_config_json(run: RunDirectory, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.train / "final", tmp_path / "model"))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**tree, "num_hidden_layers": tree["num_hidden_layers"] - 1})
    )
    with pytest.raises(ArtifactError, match=r"loads with unexpected keys \(model\.layers\.\d"):
        export_module.check_loads(folder)
    (folder / "config.json").write_text(
        json.dumps({**tree, "dtype": "float16", "torch_dtype": "float16"})
    )
    with pytest.raises(
        ArtifactError,
        match=r"is torch\.float16 instead of torch\.float32 once loaded: check torch_dtype",
    ):
        export_module.check_loads(folder)


def test_float32_needs_the_master_weights(run: RunDirectory, recipe: str) -> None:
    """An export of rounded weights as float32 would only look more precise."""
    config = ExportConfig(dtype="float32")
    file = run.train / "final" / "model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    export(run, out=None, recipe_yaml=recipe, fingerprint="x", config=config)
    rounded = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    files = [path for path in (run.train / "final").iterdir() if path.is_file()]
    write_manifest(run.train, "train", "t", info={"steps": 5}, files=files)
    with pytest.raises(
        ArtifactError,
        match=r"final holds bfloat16: remove .*train/manifest.json and run `pocl train`",
    ):
        export(run, out=None, recipe_yaml=recipe, fingerprint="y", config=config)
