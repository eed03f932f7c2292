"""Cost of scoring, ranking and planning relative to plain distillation with as many sample visits,
in seconds and FLOPs, of a finished run.

These steps come on top of the training; the schedules of temperature and SFT ratio cost nothing.
Seconds come from the manifests and metrics; FLOPs follow from the models' configurations and the
run's tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pocl_ds.bench.arguments import directory_argument
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.config.registry import RECORD_MODES
from pocl_ds.curriculum.plan_step import load_plan
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.models.cost import ModelShape, model_shape
from pocl_ds.models.estimate import step_flops
from pocl_ds.models.load import load_model_config, load_tokenizer
from pocl_ds.models.memory import TrainingSetup
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory, read_models

NAMES = ("score", "rank", "plan", "cache-teacher", "train", "baseline")


def run(arguments: Sequence[str] = (), out: Callable[[str], None] = print) -> dict[str, Any]:
    """Print and return the cost of each step. arguments: the directory of a finished run."""
    run_directory = RunDirectory(directory_argument(arguments, "the directory of a finished run"))
    if read_manifest(run_directory.train) is None:
        raise ArtifactError(
            f"{run_directory.path} holds no finished training: complete `pocl run` first"
        )
    seconds, flops = _seconds(run_directory), _flops(run_directory)
    reference = "baseline" if "baseline" in seconds else "train"
    out(f"{run_directory.path}: relative to {reference}, with as many sample visits")
    for name in NAMES:
        if name in seconds:
            share = 100 * seconds[name] / seconds[reference]
            work = (
                f"{flops[name] / 1e12:>12.2f} TFLOP{100 * flops[name] / flops[reference]:>8.1f}%"
                if name in flops
                else ""
            )
            out(f"  {name:<10}{seconds[name]:>10.1f} s{share:>8.1f}%{work}")
    extra = [name for name in ("score", "rank", "plan") if name in seconds]
    share = sum(seconds[name] for name in extra) / seconds[reference]
    work_share = sum(flops.get(name, 0.0) for name in extra) / flops[reference]
    out(
        f"scoring, ranking and planning add {100 * share:.1f}% of {reference}'s seconds and "
        f"{100 * work_share:.1f}% of its FLOPs"
    )
    return {"seconds": seconds, "flops": flops, "share": share, "flops_share": work_share}


def _seconds(run: RunDirectory) -> dict[str, float]:
    """Seconds of each step, from the manifests; of trainings, those of their optimizer steps alone,
    without loading and saving.
    """
    seconds: dict[str, float] = {}
    for name, folder, pattern in (
        ("score", run.scores, "shard-*.manifest.json"),
        ("cache-teacher", run.teacher_cache, "*/*-of-*.manifest.json"),
    ):
        manifests = [read_manifest(path.parent, path.name) for path in sorted(folder.glob(pattern))]
        if manifests:
            seconds[name] = sum(
                float(manifest.info["seconds"]) for manifest in manifests if manifest
            )
    for name, folder in (("rank", run.ranking), ("plan", run.plan)):
        manifest = read_manifest(folder)
        if manifest and "seconds" in manifest.info:
            seconds[name] = float(manifest.info["seconds"])
    for name, folder in (("train", run.train), ("baseline", run.baseline)):
        if (folder / "metrics.jsonl").is_file():
            records = read_metrics(folder / "metrics.jsonl")
            seconds[name] = sum(record["seconds"] for record in records)
    return seconds


def _flops(run: RunDirectory) -> dict[str, float]:
    """FLOPs of scoring (prompts read, responses generated, references read) and of trainings."""
    recipe, models = load_recipe(str(run.recipe)), read_models(run)
    student = model_shape(
        load_model_config(models["student"], trust_remote_code=recipe.student.trust_remote_code),
        recipe.student.lora,
    )
    teacher: ModelShape | None = None
    if recipe.teacher and models["teacher"]:
        teacher = model_shape(
            load_model_config(models["teacher"], trust_remote_code=recipe.teacher.trust_remote_code)
        )
    # FLOPs of one visit of each sample.
    split = TokenizedSplit.open(run.data, "train")
    lengths, loss = np.asarray(split.total_tokens), np.asarray(split.loss_tokens)
    totals: dict[str, float] = {}
    if any(run.scores.glob("shard-*.jsonl")):
        totals["score"] = _scoring(run, student, split)
    is_cached = recipe.teacher is not None and recipe.teacher.mode in (
        "cached_hidden_states",
        *RECORD_MODES,
    )
    mode = "none" if teacher is None else "cached_hidden_states" if is_cached else "online"
    setup = TrainingSetup(
        1, checkpointing=recipe.student.activation_checkpointing, teacher_mode=mode
    )
    sizes = zip(lengths.tolist(), loss.tolist(), strict=True)
    per_sample = np.array(
        [step_flops(student, teacher, setup, [length], count) for length, count in sizes]
    )
    if teacher is not None and mode != "online":
        totals["cache-teacher"] = sum(teacher.forward_flops([int(length)], 0) for length in lengths)
    plan = load_plan(run.plan / "plan.json")
    order = np.load(run.ranking / "order.npy")
    # Every sample of a stage is visited equally often.
    means = [per_sample[order[stage.start : stage.stop]].mean() for stage in plan.stages]
    totals["train"] = float(
        sum(mean * stage.steps for mean, stage in zip(means, plan.stages, strict=True))
        * plan.batch_size
    )
    if (run.baseline / "plan.json").is_file():
        totals["baseline"] = float(per_sample.mean() * plan.total_steps * plan.batch_size)
    return totals


def _scoring(run: RunDirectory, student: ModelShape, split: TokenizedSplit) -> float:
    """FLOPs of reading each prompt, generating a response, and reading prompt and reference."""
    recipe, model = load_recipe(str(run.recipe)), read_models(run)["student"]
    limit, total = recipe.score.max_new_tokens, 0.0
    records = [
        json.loads(line)
        for path in sorted(run.scores.glob("shard-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    tokenizer = load_tokenizer(model, trust_remote_code=recipe.student.trust_remote_code)
    rows = split.rows_of([record["id"] for record in records])
    for row, record in zip(rows, records, strict=True):
        generated = min(
            limit, len(tokenizer(record["response"], add_special_tokens=False)["input_ids"]) + 1
        )
        total += student.forward_flops([int(split.prompt_tokens[row]) + generated], generated)
        total += student.forward_flops([int(split.total_tokens[row])], int(split.loss_tokens[row]))
    return total
