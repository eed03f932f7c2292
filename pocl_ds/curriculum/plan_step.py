"""The step `plan`: from ranking/order.npy to plan/plan.json; and the plan of the baseline."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.config import BaselineConfig, CurriculumConfig
from pocl_ds.curriculum.plan import Plan, SampleOrder, build_plan, single_stage_plan, subset_stops
from pocl_ds.curriculum.sample_scores import SampleScores, places
from pocl_ds.curriculum.sample_weights import weigh_samples
from pocl_ds.curriculum.stage_files import WEIGHTS, load_array, load_weights
from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import atomic_write, read_json, save_array, write_json
from pocl_ds.workflow.manifest import Manifest, finished_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

SOLVED_ROUGE_L = 0.999  # above it an answer has the words of the reference, whatever the rounding
MAX_SOLVED = 0.9  # share of a first subset
PLAN_REMEDY = "remove plan/ and run `pocl plan` again"


def write_plan(
    run: RunDirectory,
    curriculum: CurriculumConfig,
    *,
    batch_size: int,
    seed: int,
    fingerprint: str,
) -> Manifest:
    """Write the stages of the curriculum to plan/plan.json, if they are not there already, and with
    `curriculum.sample_weights` each row's weight to plan/weights.npy.

    The plan holds no sample ids: a stage is a slice of ranking/order.npy, without the samples whose
    weight is 0. Raises RecipeError if samples, subsets and batches do not fit, ArtifactError if the
    ranking is missing or damaged.
    """
    if manifest := finished_manifest(run.plan, fingerprint):
        return manifest
    start, order = time.monotonic(), load_order(run)
    if not _is_permutation(order):
        raise ArtifactError(
            f"{run.ranking / 'order.npy'} does not name every sample once: remove ranking/ and "
            "run `pocl rank`"
        )
    # Weigh the samples, unless the student first scores them again.
    weights, rule = None, curriculum.sample_weights
    if rule and curriculum.plan_has_weights:
        weights = weigh_samples(read_scores(run, seed=seed), rule.name, rule.options)
        log.info("%s", weights_line(weights, rule.name))
    # Build the stages, and log them.
    plan = plan_from_config(order, curriculum, batch_size=batch_size, sample_weights=weights)
    for stage in plan.stages:
        log.info(
            "stage %d: %d samples, %d epochs, %d optimizer steps, temperature %.2f, SFT ratio %.2f",
            stage.index + 1,
            stage.num_samples,
            stage.epochs,
            stage.steps,
            stage.temperature,
            stage.sft_ratio,
        )
    ends = _subset_ends(order, plan, weights)
    solved = _solved_share(run, ends[0])
    if weights is None and (message := _solved_warning(plan, solved)):
        log.warning("%s", message)
    # Write the plan, then its manifest.
    write_json(run.plan / "plan.json", {**plan.to_json(), "subset_ends": ends})
    (run.plan / WEIGHTS).unlink(missing_ok=True)
    if weights is not None:
        with atomic_write(run.plan / WEIGHTS, "wb") as stream:
            save_array(stream, weights)
    info = {
        "samples": len(order),
        "left_out": 0 if weights is None else int((weights == 0).sum()),
        "steps": plan.total_steps,
        "visits": plan.total_steps * batch_size,
        "first_subset_solved": solved,
        "seconds": time.monotonic() - start,
    }
    return write_manifest(run.plan, "plan", fingerprint, info=info)


def _solved_warning(plan: Plan, solved: float | None) -> str | None:
    """A warning of a first subset that teaches the student little. solved: the share of its samples
    that the student answers as the reference does; None if it is not known.
    """
    first, stages = plan.stages[0], plan.stages
    if solved is None or solved < MAX_SOLVED or plan.scheduler != "baby_step" or len(stages) == 1:
        return None
    visits = first.num_samples * sum(stage.epochs for stage in stages)
    share = visits / sum(stage.num_samples * stage.epochs for stage in stages)
    return (
        f"plan: before training the student answers {solved:.0%} of the first subset as the "
        f"reference does (ROUGE-L 1), and {share:.0%} of all sample visits go there: a rule of "
        "curriculum.sample_weights can leave such samples out, and "
        "curriculum.scheduler=all_samples visits all samples equally often"
    )


def _solved_share(run: RunDirectory, stop: int) -> float | None:
    """Share of the first `stop` samples of the ranking whose ROUGE-L is 1; None without ROUGE-L."""
    path = run.ranking / "ranking.parquet"
    if "rouge_l" not in pq.read_schema(path).names:
        return None
    rouge_l = pq.read_table(path, columns=["rouge_l"])["rouge_l"].to_numpy()[:stop]
    return float((rouge_l > SOLVED_ROUGE_L).mean())


def plan_from_config(
    order: SampleOrder,
    curriculum: CurriculumConfig,
    *,
    batch_size: int,
    sample_weights: NDArray[np.float32] | None = None,
) -> Plan:
    """`build_plan` with the values of a recipe."""
    return build_plan(
        order,
        num_subsets=curriculum.num_subsets,
        epochs_per_stage=curriculum.epochs_per_stage,
        batch_size=batch_size,
        temperature=curriculum.temperature,
        sft_ratio=curriculum.sft_ratio,
        scheduler=curriculum.scheduler,
        drop_last=curriculum.drop_last,
        sample_weights=sample_weights,
    )


def build_baseline_plan(order: SampleOrder, plan: Plan, baseline: BaselineConfig) -> Plan:
    """Plain KD with as many optimizer steps as the curriculum: one stage over all samples, at one
    temperature and one SFT ratio.
    """
    return single_stage_plan(
        order,
        steps=plan.total_steps,
        batch_size=plan.batch_size,
        temperature=baseline.temperature,
        sft_ratio=baseline.sft_ratio,
        drop_last=plan.drop_last,
    )


def load_plan(path: Path) -> Plan:
    """Load the curriculum's plan with the order and the weights of its run. Raises ArtifactError if
    one of them is unusable.
    """
    return Plan.from_json(
        read_json(path),
        load_order(RunDirectory(path.parents[1])),
        load_weights(path.parent, PLAN_REMEDY),
    )


def rows_of_stages(
    run: RunDirectory, planned: int, stages: int, *, fingerprint: str
) -> list[NDArray[np.int64] | None]:
    """The training samples of each stage; None for a stage that the student ranks, which may have
    any.

    planned: number of stages before those. fingerprint: of the plan. Raises ArtifactError if the
    plan is needed and missing, or of another recipe.
    """
    if not planned:
        return [None] * stages
    if finished_manifest(run.plan, fingerprint) is None:
        raise ArtifactError(
            f"{run.plan} holds no plan of this recipe, and with teacher.by_stage the cache has for "
            "each teacher the samples of its stages: run `pocl plan` first"
        )
    return [
        np.asarray(stage.sample_ids) if stage.index < planned else None
        for stage in load_plan(run.plan / "plan.json").stages
    ]


def read_scores(run: RunDirectory, *, seed: int) -> SampleScores:
    """What ranking/ranking.parquet says of each training sample, and its place in the ranking."""
    order, table = load_order(run), pq.read_table(run.ranking / "ranking.parquet")
    ids = np.load(run.data / "train.ids.npy", mmap_mode="r")
    columns = {"place": places(order)}
    for name in table.column_names:
        if pa.types.is_floating(table[name].type):
            columns[name] = np.empty(len(order))
            columns[name][order] = table[name].to_numpy()
    return SampleScores(ids, columns, 0, seed)


def _subset_ends(
    order: NDArray[np.int64], plan: Plan, weights: NDArray[np.float32] | None
) -> list[int]:
    """Where each subset ends in the ranking, which also holds the samples that are left out."""
    stops = subset_stops(plan.stages[-1].stop, len(plan.stages))
    if weights is None:
        return stops
    selected = np.flatnonzero(weights[order] > 0)
    return [*(int(selected[stop]) for stop in stops[:-1]), len(order)]


def weights_line(weights: NDArray[np.float32], name: str) -> str:
    """A line for the log: what a rule left out, and the range of the other weights."""
    positive = weights[weights > 0]
    left_out = len(weights) - len(positive)
    return (
        f"sample weights by {name}: {left_out} of {len(weights)} samples left out, "
        f"the others from {positive.min():.3g} to {positive.max():.3g}"
    )


def optimizer_steps_by_stage(run: RunDirectory, training: str) -> list[int]:
    """Optimizer steps of each stage of `train` or `baseline`; empty if there is no plan yet."""
    path = (run.baseline if training == "baseline" else run.plan) / "plan.json"
    return [int(stage["steps"]) for stage in read_json(path)["stages"]] if path.is_file() else []


def load_order(run: RunDirectory) -> NDArray[np.int64]:
    """The difficulty ranking: rows of the training samples, easiest first. Raises ArtifactError if
    it is missing or damaged.
    """
    path = run.ranking / "order.npy"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run `pocl rank` first")
    return load_array(path, "remove ranking/ and run `pocl rank` again")


def _is_permutation(order: NDArray[np.int64]) -> bool:
    if order.ndim != 1 or (len(order) and not (order.min() >= 0 and order.max() < len(order))):
        return False
    occurs = np.zeros(len(order), bool)
    occurs[order] = True
    return bool(occurs.all())
