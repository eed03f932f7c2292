"""How the trainings of a recipe use the teachers' outputs, for the step `cache-teacher`."""

from __future__ import annotations

from dataclasses import replace

from pocl_ds.config import Recipe
from pocl_ds.curriculum.plan import mean_sample_visits
from pocl_ds.curriculum.plan_step import rows_of_stages
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.step_inputs import planned_stages, teacher_temperatures
from pocl_ds.workflow.steps import fingerprints


def teacher_usage(recipe: Recipe, run: RunDirectory) -> TeacherUsage:
    """Visits and temperatures of all trainings, and with teachers by stage the samples of the
    stages. Raises ArtifactError if the plan is needed and missing.
    """
    # The baseline visits the samples as often as the curriculum does.
    curriculum, has_baseline = recipe.curriculum, recipe.baseline.enabled
    visits = mean_sample_visits(
        curriculum.num_subsets, curriculum.epochs_per_stage, curriculum.scheduler
    )
    temperatures = teacher_temperatures(recipe)
    usage = TeacherUsage(2 * visits if has_baseline else visits, temperatures)
    if recipe.teacher is None or not recipe.teacher.by_stage:
        return usage
    rows = rows_of_stages(
        run,
        planned_stages(recipe),
        curriculum.num_subsets,
        fingerprint=fingerprints(recipe)["plan"],
    )
    return replace(usage, stage_rows=rows, has_baseline=has_baseline)
