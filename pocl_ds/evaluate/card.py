"""The model card of an exported student: what it is, how it was made, how well it does. No path of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pocl_ds.artifacts import RunDirectory, package_versions, read_json, read_manifest
from pocl_ds.evaluate.tables import markdown_table
from pocl_ds.plain_yaml import dump_yaml, plain_value

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(run: RunDirectory, recipe_yaml: str, parameters: int) -> str:
    """README.md in the form of the Hub: YAML front matter, then Markdown. Parts that the run lacks are said to be missing."""
    recipe = portable(plain_value(recipe_yaml))
    judge = (recipe.get("evaluate") or {}).get("judge")
    if judge:
        del judge["base_url"]  # which hosts there are is nobody's business
    student, teacher = recipe["student"]["model"], (recipe.get("teacher") or {}).get("model")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pocl_ds", "knowledge-distillation", "curriculum-learning"],
    }
    if HUB_NAME.fullmatch(student) and not Path(student).exists():
        front["base_model"] = student
    name = recipe["name"]
    parts = [
        "---\n" + dump_yaml(front) + "---\n",
        f"# {name}\n",
        f"A student of {parameters / 1e6:.1f} million parameters, {_origin(recipe, student, teacher)}\n",
        "## Results\n",
        _results(run),
        "## Training\n",
        _training(run, recipe),
        "## Data\n",
        _data(run, recipe),
        "## Use\n",
        '```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
        f"Prompts had the template `{recipe['prompt']['template']}`, at most {recipe['prompt']['max_prompt_tokens']} tokens.\n",
        "## Recipe\n",
        "```yaml\n" + dump_yaml(recipe) + "```\n",
        "## Versions\n",
        _versions(run),
    ]
    return "\n".join(parts)


def portable(value: Any) -> Any:
    """A tree of plain values in which a path of this machine is only its last part."""
    if isinstance(value, dict):
        return {key: portable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [portable(entry) for entry in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~", "./", "../"))):
        return Path(value).name
    return value


def _origin(recipe: dict[str, Any], student: str, teacher: str | None) -> str:
    text = f"made from `{student}`"
    if recipe["student"].get("prune"):
        text += f" without its layers {recipe['student']['prune']['drop_layers']}"
    if teacher is None:
        return text + " by supervised fine-tuning over a curriculum (no teacher)."
    text += f" and distilled from the teacher `{teacher}` by progressive overload curriculum learning"
    return text + " (POCL, arXiv 2506.05695)."


def _results(run: RunDirectory) -> str:
    manifest = read_manifest(run.evaluation)
    if manifest is None:
        return "This model was not evaluated.\n"
    results = read_json(run.evaluation / "results.json")
    seeds = len(results["seeds"])
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    return (
        markdown_table(results) + f"\nLoss and KL: nats per token of held-out responses. ROUGE-L x100{spread}.\n"
    )


def _training(run: RunDirectory, recipe: dict[str, Any]) -> str:
    plan, manifest = read_json(run.plan / "plan.json"), read_manifest(run.train)
    train, loss = recipe["train"], recipe["loss"]
    lines = [
        f"- loss: `{loss['name']}`; optimizer AdamW, batch {plan['batch_size']}, learning rate {train['lr']:g} to "
        f"{train['lr_end']:g} ({train['schedule']})",
        f"- {plan['scheduler']} curriculum by `{recipe['rank']['strategy']}` difficulty",
    ]
    if recipe["student"].get("heal_steps"):
        lines.append(f"- healed first by {recipe['student']['heal_steps']} steps of plain distillation")
    if manifest is not None and "seconds" in manifest.info:
        lines.append(f"- trained in {manifest.info['seconds']:.0f} s on {manifest.info.get('ranks', 1)} ranks")
    rows = ["| stage | samples | epochs | steps | tau | SFT ratio |", "| ---: | ---: | ---: | ---: | ---: | ---: |"]
    for stage in plan["stages"]:
        rows.append(f"| {stage['index'] + 1} | {stage['stop'] - stage['start']} | {stage['epochs']} | {stage['steps']} "
                    f"| {stage['tau']:.3g} | {stage['alpha']:.3g} |")
    return "\n".join([*lines, "", *rows]) + "\n"


def _data(run: RunDirectory, recipe: dict[str, Any]) -> str:
    manifest = read_manifest(run.data)
    if manifest is None:
        return "The data folder of the run is gone.\n"
    splits = manifest.info.get("splits", {})
    counts = ", ".join(f"{split} {tree['samples']}" for split, tree in splits.items())
    return (f"Source `{recipe['data']['source']}` (samples: {counts}); fingerprint of data and preparation "
            f"`{manifest.fingerprint}`.\n")


def _versions(run: RunDirectory) -> str:
    manifest = read_manifest(run.train)
    versions = (manifest.versions if manifest else None) or package_versions()
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "\n"
