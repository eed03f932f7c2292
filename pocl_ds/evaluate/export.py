"""The student as others get it: a Hugging Face folder with a model card, checked key by key against what was trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pocl_ds.artifacts import MANIFEST, RunDirectory, atomic_directory, read_json, read_manifest, write_manifest
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluate.tables import markdown_table

CARD = "README.md"


def export(run: RunDirectory, *, out: Path | None, recipe_yaml: str, fingerprint: str) -> Path:
    """Write the trained student to `out` (default: the run's export/). Returns the folder.

    Raises ArtifactError where nothing is trained, `out` is somebody else's folder, or a weight differs from the trained one.
    """
    final = run.train / "final"
    if not final.is_dir() or read_manifest(run.train) is None:
        raise ArtifactError(f"{final} is missing or unfinished: run `pocl train` first")
    target = out or run.export
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest and manifest.fingerprint == fingerprint:
        return target
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and (not manifest or manifest.stage != "export"))):
        raise ArtifactError(f"{target} exists and is not an export of this program: choose another --out")
    with atomic_directory(target) as folder:
        for file in sorted(final.iterdir()):
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, folder / file.name)
        (folder / CARD).write_text(_card(run, recipe_yaml), encoding="utf-8")
        check_weights(folder, final)
        write_manifest(folder, "export", fingerprint)
    return target


def check_weights(folder: Path, trained: Path) -> None:
    """Compare every tensor of an export with the trained one, and load it. Raises ArtifactError naming the first difference."""
    ours, theirs = _tensors(folder), _tensors(trained)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            fault = "missing" if name not in ours else "not a trained one"
            raise ArtifactError(f"{folder}: weight {name} is {fault}: export again")
        if ours[name].dtype != theirs[name].dtype or ours[name].shape != theirs[name].shape or not ours[name].equal(theirs[name]):
            raise ArtifactError(f"{folder}: weight {name} differs from the trained one: export again")
    _, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded[kind]:
            raise ArtifactError(f"{folder} does not load whole ({kind}: {sorted(map(str, loaded[kind]))[0]}): train again")


def _tensors(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            found.update({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118 - not a dict
    return found


def _card(run: RunDirectory, recipe_yaml: str) -> str:
    """The model card. Paths of the machine stay out of it."""
    data, train = read_manifest(run.data), read_manifest(run.train)
    plan = read_json(run.plan / "plan.json")
    recipe = "\n".join(line for line in recipe_yaml.splitlines())
    results = run.evaluation / "results.json"
    stages = "\n".join(
        f"| {s['index'] + 1} | {s['stop'] - s['start']} | {s['epochs']} | {s['steps']} | {s['tau']:.2f} | {s['alpha']:.2f} |"
        for s in plan["stages"]
    )
    table = markdown_table(read_json(results)) if results.is_file() else "Not evaluated."
    samples = data.info["splits"]["train"]["samples"] if data else "?"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation, pocl]
---

# Distilled student

Distilled by curriculum (POCL, arXiv 2506.05695) with pocl_ds.

## Results

Held-out loss and KL in nats a token; ROUGE-L times 100, mean ± deviation over seeds.

{table}

## Training

{samples} samples (data fingerprint `{data.fingerprint[:16] if data else "?"}`), {train.info["steps"] if train else "?"} optimizer
steps of {plan["batch_size"]} samples.

| stage | samples | epochs | steps | tau | SFT ratio |
|---:|---:|---:|---:|---:|---:|
{stages}

Versions: {", ".join(f"{name} {version}" for name, version in (train.versions if train else {}).items())}

## Recipe

```yaml
{recipe}
```
"""
