"""The step `plan`: from ranking/order.npy to plan/plan.json; and the plan of the baseline."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import BaselineConfig, CurriculumConfig
from pocl_ds.curriculum.plan import Plan, SampleOrder, build_plan, single_stage_plan
from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import read_json, write_json
from pocl_ds.workflow.manifest import Manifest, finished_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")


def write_plan(
    run: RunDirectory, curriculum: CurriculumConfig, *, batch_size: int, fingerprint: str
) -> Manifest:
    """Write the stages of the curriculum to plan/plan.json, if they are not there already.

    The file holds no sample ids: a stage is a slice of ranking/order.npy. Raises RecipeError if
    samples, subsets and batches do not fit, ArtifactError if the ranking is missing or damaged.
    """
    if manifest := finished_manifest(run.plan, fingerprint):
        return manifest
    start, order = time.monotonic(), _load_order(run)
    if not _is_permutation(order):
        raise ArtifactError(
            f"{run.ranking / 'order.npy'} does not name every sample once: remove ranking/ and "
            "run `pocl rank`"
        )
    # Build the stages, and log them.
    plan = plan_from_config(order, curriculum, batch_size=batch_size)
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
    # Write the plan, then its manifest.
    write_json(run.plan / "plan.json", plan.to_json())
    info = {
        "samples": len(order),
        "steps": plan.total_steps,
        "visits": plan.total_steps * batch_size,
        "seconds": time.monotonic() - start,
    }
    return write_manifest(run.plan, "plan", fingerprint, info=info)


def plan_from_config(order: SampleOrder, curriculum: CurriculumConfig, *, batch_size: int) -> Plan:
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
    )


def build_baseline_plan(plan: Plan, baseline: BaselineConfig) -> Plan:
    """Plain KD with as many optimizer steps as the curriculum: one stage over all samples, at one
    temperature and one SFT ratio.
    """
    return single_stage_plan(
        plan.stages[-1].order,
        steps=plan.total_steps,
        batch_size=plan.batch_size,
        temperature=baseline.temperature,
        sft_ratio=baseline.sft_ratio,
        drop_last=plan.drop_last,
    )


def load_plan(path: Path) -> Plan:
    """Load a plan with the order of its run. Raises ArtifactError if either is unusable."""
    return Plan.from_json(read_json(path), _load_order(RunDirectory(path.parents[1])))


def optimizer_steps_by_stage(run: RunDirectory, training: str) -> list[int]:
    """Optimizer steps of each stage of `train` or `baseline`; empty if there is no plan yet."""
    path = (run.baseline if training == "baseline" else run.plan) / "plan.json"
    return [int(stage["steps"]) for stage in read_json(path)["stages"]] if path.is_file() else []


def _load_order(run: RunDirectory) -> NDArray[np.int64]:
    path = run.ranking / "order.npy"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run `pocl rank` first")
    try:
        order: NDArray[np.int64] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): remove ranking/ and run `pocl rank` again"
        ) from None
    return order


def _is_permutation(order: NDArray[np.int64]) -> bool:
    if order.ndim != 1 or (len(order) and not (order.min() >= 0 and order.max() < len(order))):
        return False
    occurs = np.zeros(len(order), bool)
    occurs[order] = True
    return bool(occurs.all())
