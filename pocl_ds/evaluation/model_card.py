"""The model card of an exported student: its origin, results, training, data and recipe.

The card holds no path of the machine that wrote it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pocl_ds.config.registry import FILE_STRATEGY, LENGTH_STRATEGY, STRATEGIES_WITHOUT_ROUGE_L
from pocl_ds.config.yaml_io import dump_yaml, parse_yaml
from pocl_ds.evaluation.tables import markdown_table
from pocl_ds.runtime.formatting import code_block, inline_code
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import package_versions, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEMPLATE = """\
---
{front_matter}
---

# {name}

A student of {parameters:.1f} million parameters, {origin}

## Results

{results}

## Training

{training}

## Data

{data}

## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Prompts follow the template {prompt_template} and have at most {max_prompt_tokens} tokens.

## Recipe

{recipe}

## Versions

{versions}
"""


def model_card(run: RunDirectory, recipe_yaml: str, parameters: int) -> str:
    """The README.md of an export: front matter as the Hub reads it, then Markdown.

    Sections whose results the run lacks say that they are missing.
    """
    from huggingface_hub import ModelCardData

    recipe = remove_local_paths(parse_yaml(recipe_yaml))
    judge = (recipe.get("evaluate") or {}).get("judge")
    if judge:
        del judge["base_url"]  # the name of an internal host
    student, plan = recipe["student"]["model"], read_json(run.plan / "plan.json")
    on_hub = HUB_NAME.fullmatch(student) and not Path(student).exists()
    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "pocl_ds",
            *(["knowledge-distillation"] if recipe.get("teacher") else []),
            *(["curriculum-learning"] if len(plan["stages"]) > 1 else []),
        ],
        base_model=student if on_hub else None,
    )
    return TEMPLATE.format(
        front_matter=front_matter.to_yaml(),
        name=recipe["name"],
        parameters=parameters / 1e6,
        origin=_origin(recipe, plan),
        results=_results(run),
        training=_training(run, recipe, plan),
        data=_data(run, recipe),
        prompt_template=inline_code(recipe["prompt"]["template"]),
        max_prompt_tokens=recipe["prompt"]["max_prompt_tokens"],
        recipe=code_block(dump_yaml(recipe), "yaml"),
        versions=_versions(run),
    )


def remove_local_paths(value: Any) -> Any:
    """The tree of plain values with every local path reduced to its last part."""
    if isinstance(value, dict):
        return {key: remove_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [remove_local_paths(entry) for entry in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~", "./", "../"))):
        return Path(value).name
    return value


def _origin(recipe: dict[str, Any], plan: dict[str, Any]) -> str:
    """What the student was made from, and by which method, in one sentence."""
    student, policy, ranking = recipe["student"], recipe["policy"], recipe["ranking"]
    text = f"made from {inline_code(student['model'])}"
    if student.get("prune"):
        text += f" without its layers {student['prune']['drop_layers']}"
    has_curriculum = len(plan["stages"]) > 1
    is_pocl = (
        plan["scheduler"] == "baby_step"
        and ranking["strategy"] not in STRATEGIES_WITHOUT_ROUGE_L
        and not ranking["reverse"]
    )
    curriculum = (
        "progressive overload curriculum learning (POCL, arXiv 2506.05695)"
        if is_pocl
        else "a curriculum"
    )
    if recipe["loss"]["name"] != "sft":
        method = curriculum if has_curriculum else "plain KD"
        text += f" and distilled from the {_teachers(recipe['teacher'])} by {method}"
        if policy["name"] != "off":
            text += f", on responses by the policy {_policy(policy)}"
        return text + "."
    text += " by supervised fine-tuning"
    if recipe.get("teacher"):
        data = "the data's responses and " if policy["name"] != "seqkd" else ""
        text += (
            f" on {data}responses of the {_teachers(recipe['teacher'])} (policy {_policy(policy)})"
        )
    text += f", with {curriculum}" if has_curriculum else ""
    return text + ("." if recipe.get("teacher") else "; no teacher.")


def _teachers(teacher: dict[str, Any]) -> str:
    ensemble = teacher.get("ensemble") or []
    routes = {
        f"{kind} {inline_code(key)}": source["model"]
        for kind, field in (("stage", "by_stage"), ("domain", "by_domain"))
        for key, source in (teacher.get(field) or {}).items()
    }
    if routes:
        listed = ", ".join(f"{inline_code(model)} for {key}" for key, model in routes.items())
        return f"teachers {listed} and {inline_code(teacher['model'])} for the rest"
    if not ensemble:
        return f"teacher {inline_code(teacher['model'])}"
    members = [
        f"{inline_code(entry['model'])} (weight {entry['weight']:g})"
        for entry in (teacher, *ensemble)
    ]
    return f"teachers {', '.join(members[:-1])} and {members[-1]}"


def _policy(policy: dict[str, Any]) -> str:
    if policy["name"] != "mixture":
        return f"`{policy['name']}`"
    shares = ", ".join(f"{source} {share:g}" for source, share in policy["shares"].items())
    return f"`mixture` ({shares})"


def _results(run: RunDirectory) -> str:
    if read_manifest(run.evaluation) is None:
        return "This model was not evaluated."
    results = read_json(run.evaluation / "results.json")
    if not any(entry["benchmarks"] for entry in results["models"].values()):
        return "This model was not evaluated: the data had no test samples."
    seeds = len(results["seeds"])
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    return (
        f"{markdown_table(results)}\nLoss and KL: nats per token of held-out responses. "
        f"ROUGE-L x100{spread}."
    )


def _training(run: RunDirectory, recipe: dict[str, Any], plan: dict[str, Any]) -> str:
    manifest, train, loss = read_manifest(run.train), recipe["train"], recipe["loss"]
    lines = [
        f"- loss: `{loss['name']}`; optimizer AdamW, batch {plan['batch_size']}, learning rate "
        f"{train['lr']:g} to {train['min_lr']:g} (restart: {train['lr_restart']})",
        f"- {plan['scheduler']} curriculum {_order(recipe['ranking'])}"
        if len(plan["stages"]) > 1
        else "- no curriculum: one stage over all samples",
    ]
    if steps := recipe["student"].get("heal_steps"):
        lines.append(f"- healed by {steps} steps of plain KD before scoring")
    if manifest is not None and "seconds" in manifest.info:
        seconds, ranks = manifest.info["seconds"], manifest.info.get("ranks", 1)
        own = manifest.info.get("teacher_ranks")
        teacher = f", and the teacher on {own} of its own" if own else ""
        lines.append(f"- trained in {seconds:.0f} s on {ranks} ranks{teacher}")
    return "\n".join([*lines, "", *_stage_table(plan, with_schedules=loss["name"] != "sft")])


def _order(ranking: dict[str, Any]) -> str:
    if ranking["strategy"] == "random":
        return "in random order"
    hardest_first = ", hardest first" if ranking["reverse"] else ""
    if ranking["strategy"] == FILE_STRATEGY:
        return f"by a difficulty that was computed elsewhere{hardest_first}"
    if ranking["strategy"] == LENGTH_STRATEGY:
        return f"by the length of the response{hardest_first}"
    return f"by `{ranking['strategy']}` difficulty{hardest_first}"


def _stage_table(plan: dict[str, Any], *, with_schedules: bool) -> list[str]:
    """Markdown rows of the stages; temperature and SFT ratio have no effect on plain SFT."""
    header = ["stage", "samples", "epochs", "optimizer steps"]
    header += ["temperature", "SFT ratio"] if with_schedules else []
    rows = [header, ["---:"] * len(header)]
    for stage in plan["stages"]:
        samples = stage["stop"] - stage["start"]
        cells = [str(stage["index"] + 1), str(samples), str(stage["epochs"]), str(stage["steps"])]
        if with_schedules:
            cells += [f"{stage['temperature']:.3g}", f"{stage['sft_ratio']:.3g}"]
        rows.append(cells)
    return [f"| {' | '.join(row)} |" for row in rows]


def _data(run: RunDirectory, recipe: dict[str, Any]) -> str:
    manifest = read_manifest(run.data)
    if manifest is None:
        return "The data folder of the run is missing."
    splits = manifest.info.get("splits", {})
    counts = ", ".join(f"{split} {tree['samples']}" for split, tree in splits.items())
    return (
        f"Source {inline_code(recipe['data']['source'])} (samples: {counts}); fingerprint of data "
        f"and preprocessing `{manifest.fingerprint}`."
    )


def _versions(run: RunDirectory) -> str:
    manifest = read_manifest(run.train)
    versions = (manifest.versions if manifest else None) or package_versions()
    return ", ".join(f"{name} {version}" for name, version in versions.items())
