"""The model card of an exported student: what it is, how it was made, how well it does. No path of
this machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pocl_ds.config.yaml_io import dump_yaml, plain_value
from pocl_ds.evaluation.tables import markdown_table
from pocl_ds.workflow.run_dir import RunDirectory, package_versions, read_json, read_manifest

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(run: RunDirectory, recipe_yaml: str, parameters: int) -> str:
    """README.md in the form of the Hub: YAML front matter, then Markdown. Parts that the run lacks
    are said to be missing.
    """
    recipe = portable(plain_value(recipe_yaml))
    judge = (recipe.get("evaluate") or {}).get("judge")
    if judge:
        del judge["base_url"]  # which hosts there are is nobody's business
    student, plan = recipe["student"]["model"], read_json(run.plan / "plan.json")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "pocl_ds",
            *(["knowledge-distillation"] if recipe.get("teacher") else []),
            *(["curriculum-learning"] if len(plan["stages"]) > 1 else []),
        ],
    }
    if HUB_NAME.fullmatch(student) and not Path(student).exists():
        front["base_model"] = student
    name = recipe["name"]
    parts = [
        "---\n" + dump_yaml(front) + "---\n",
        f"# {name}\n",
        f"A student of {parameters / 1e6:.1f} million parameters, {_origin(recipe, plan)}\n",
        "## Results\n",
        _results(run),
        "## Training\n",
        _training(run, recipe, plan),
        "## Data\n",
        _data(run, recipe),
        "## Use\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
        f"Prompts had the template `{recipe['prompt']['template']}`, at most "
        f"{recipe['prompt']['max_prompt_tokens']} tokens.\n",
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


def _origin(recipe: dict[str, Any], plan: dict[str, Any]) -> str:
    """What it was made from and by which method, in one sentence."""
    text, policy, rank = (
        f"made from `{recipe['student']['model']}`",
        recipe["policy"],
        recipe["ranking"],
    )
    if recipe["student"].get("prune"):
        text += f" without its layers {recipe['student']['prune']['drop_layers']}"
    several = len(plan["stages"]) > 1
    as_published = (
        plan["scheduler"] == "baby_step" and rank["strategy"] != "random" and not rank["reverse"]
    )
    named = (
        "progressive overload curriculum learning (POCL, arXiv 2506.05695)"
        if as_published
        else "a curriculum"
    )
    if recipe["loss"]["name"] != "sft":
        text += f" and distilled from the {_teachers(recipe['teacher'])} by {named if several else 'plain KD'}"
        return text + (
            "." if policy["name"] == "off" else f", on responses by the policy {_policy(policy)}."
        )
    text += " by supervised fine-tuning"
    if recipe.get("teacher"):
        data = "the data's responses and " if policy["name"] != "seqkd" else ""
        text += (
            f" on {data}what the {_teachers(recipe['teacher'])} wrote (policy {_policy(policy)})"
        )
    text += f", with {named}" if several else ""
    return text + ("." if recipe.get("teacher") else "; no teacher.")


def _teachers(teacher: dict[str, Any]) -> str:
    others = teacher.get("ensemble") or []
    if not others:
        return f"teacher `{teacher['model']}`"
    every = [f"`{one['model']}` (weight {one['weight']:g})" for one in (teacher, *others)]
    return f"teachers {', '.join(every[:-1])} and {every[-1]}"


def _policy(policy: dict[str, Any]) -> str:
    if policy["name"] != "mixture":
        return f"`{policy['name']}`"
    return f"`mixture` ({', '.join(f'{source} {share:g}' for source, share in policy['shares'].items())})"


def _results(run: RunDirectory) -> str:
    manifest = read_manifest(run.evaluation)
    if manifest is None:
        return "This model was not evaluated.\n"
    results = read_json(run.evaluation / "results.json")
    seeds = len(results["seeds"])
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    return (
        markdown_table(results)
        + f"\nLoss and KL: nats per token of held-out responses. ROUGE-L x100{spread}.\n"
    )


def _training(run: RunDirectory, recipe: dict[str, Any], plan: dict[str, Any]) -> str:
    manifest, train, loss, rank = (
        read_manifest(run.train),
        recipe["train"],
        recipe["loss"],
        recipe["ranking"],
    )
    order = (
        "in random order" if rank["strategy"] == "random" else f"by `{rank['strategy']}` difficulty"
    )
    order += ", hardest first" if rank["reverse"] else ""
    lines = [
        f"- loss: `{loss['name']}`; optimizer AdamW, batch {plan['batch_size']}, learning rate "
        f"{train['lr']:g} to "
        f"{train['min_lr']:g} ({train['lr_restart']})",
        f"- {plan['scheduler']} curriculum {order}"
        if len(plan["stages"]) > 1
        else "- no curriculum: one stage over all samples",
    ]
    if recipe["student"].get("heal_steps"):
        lines.append(
            f"- healed first by {recipe['student']['heal_steps']} steps of plain distillation"
        )
    if manifest is not None and "seconds" in manifest.info:
        lines.append(
            f"- trained in {manifest.info['seconds']:.0f} s on {manifest.info.get('ranks', 1)} "
            f"ranks"
        )
    blended = loss["name"] != "sft"  # of SFT alone neither has an effect
    header = [
        "stage",
        "samples",
        "epochs",
        "steps",
        *(["temperature", "SFT ratio"] if blended else []),
    ]
    rows = [header, ["---:"] * len(header)]
    for stage in plan["stages"]:
        cells = [
            stage["index"] + 1,
            stage["stop"] - stage["start"],
            stage["epochs"],
            stage["steps"],
        ]
        rows.append(
            [
                *map(str, cells),
                *([f"{stage['temperature']:.3g}", f"{stage['sft_ratio']:.3g}"] if blended else []),
            ]
        )
    return "\n".join([*lines, "", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _data(run: RunDirectory, recipe: dict[str, Any]) -> str:
    manifest = read_manifest(run.data)
    if manifest is None:
        return "The data folder of the run is gone.\n"
    splits = manifest.info.get("splits", {})
    counts = ", ".join(f"{split} {tree['samples']}" for split, tree in splits.items())
    return (
        f"Source `{recipe['data']['source']}` (samples: {counts}); fingerprint of data and "
        f"preparation "
        f"`{manifest.fingerprint}`.\n"
    )


def _versions(run: RunDirectory) -> str:
    manifest = read_manifest(run.train)
    versions = (manifest.versions if manifest else None) or package_versions()
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "\n"
