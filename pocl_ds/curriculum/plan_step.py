"""The stage `plan`: ranking/order.npy -> plan/plan.json; and the plan of the baseline beside it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import BaselineConfig, CurriculumConfig
from pocl_ds.curriculum.plan import Order, Plan, build_plan, single_stage_plan
from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.run_dir import (
    Manifest,
    RunDirectory,
    read_json,
    whole_result,
    write_json,
    write_manifest,
)

log = logging.getLogger("pocl_ds")


def make_plan(
    run: RunDirectory, plan: CurriculumConfig, *, batch_size: int, fingerprint: str
) -> Manifest:
    """Write plan/plan.json, the stages of POCL.

    It holds no sample ids: a stage is a slice of ranking/order.npy. Raises RecipeError where
    samples, subsets and batches do not fit, ArtifactError where the ranking is missing or not an
    order of all samples.
    """
    if manifest := whole_result(run.plan, fingerprint):
        return manifest
    start, order = time.monotonic(), _order(run)
    if not _is_permutation(order):
        raise ArtifactError(
            f"{run.ranking / 'order.npy'} does not name every sample once: remove ranking/ and "
            f"run `pocl rank`"
        )
    pocl = plan_of(order, plan, batch_size=batch_size)
    for stage in pocl.stages:
        log.info(
            "stage %d: %d samples, %d epochs, %d steps, temperature %.2f, SFT ratio %.2f",
            stage.index + 1,
            stage.samples,
            stage.epochs,
            stage.steps,
            stage.temperature,
            stage.sft_ratio,
        )
    write_json(run.plan / "plan.json", pocl.to_json())
    info = {
        "samples": len(order),
        "steps": pocl.total_steps,
        "visits": pocl.total_steps * batch_size,
        "seconds": time.monotonic() - start,
    }
    return write_manifest(run.plan, "plan", fingerprint, info=info)


def plan_of(order: Order, curriculum: CurriculumConfig, *, batch_size: int) -> Plan:
    """See `build_plan`."""
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


def baseline_plan(pocl: Plan, baseline: BaselineConfig) -> Plan:
    """Plain KD with as many sample visits as POCL: one stage over all samples at one temperature
    and one SFT ratio.
    """
    order = pocl.stages[-1].order
    return single_stage_plan(
        order,
        steps=pocl.total_steps,
        batch_size=pocl.batch_size,
        temperature=baseline.temperature,
        sft_ratio=baseline.sft_ratio,
        drop_last=pocl.drop_last,
    )


def load_plan(path: Path) -> Plan:
    """A plan and the order it stands on."""
    return Plan.from_json(read_json(path), _order(RunDirectory(path.parents[1])))


def steps_of_stages(run: RunDirectory, training: str) -> list[int]:
    """Steps of each stage of `train` or `baseline`, from its plan alone; empty where there is none
    yet.
    """
    path = (run.baseline if training == "baseline" else run.plan) / "plan.json"
    return [int(stage["steps"]) for stage in read_json(path)["stages"]] if path.is_file() else []


def _order(run: RunDirectory) -> NDArray[np.int64]:
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
    seen = np.zeros(len(order), bool)
    seen[order] = True
    return bool(seen.all())
