"""The teachers of a recipe for `pocl estimate`, and which part of the samples each one caches."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_ds.config import ModelSource, Recipe
from pocl_ds.curriculum.plan import Plan
from pocl_ds.models.cost import ModelShape
from pocl_ds.teachers.routed import distinct_models, models_of_stages
from pocl_ds.workflow.step_inputs import planned_stages


def other_teachers(recipe: Recipe) -> list[ModelSource]:
    """The models of section `teacher` besides the first, each once."""
    _, *teachers = recipe.local_models
    return list({teacher.label: teacher for teacher in teachers}.values())[1:]


def cached_shares(
    recipe: Recipe, shapes: Sequence[ModelShape], plan: Plan
) -> list[tuple[ModelShape, float]]:
    """Each teacher, and the fraction of the samples that it caches.

    By domain, whose sizes are not known before `preprocess`, the teacher with the widest states
    counts for all. shapes: of the different teachers, the first one first.
    """
    teacher = recipe.local_teacher
    if teacher is None:
        return []
    if teacher.by_domain:
        return [(max(shapes, key=lambda shape: shape.width), 1.0)]
    if not teacher.by_stage:
        return [(shapes[0], 1.0)]
    everything = range(plan.stages[-1].stop)
    samples = [set[int]() for _ in shapes]
    models = distinct_models(teacher, [source.label for source in teacher.sources])
    numbers = models_of_stages(models, len(plan.stages))
    for number, stage in zip(numbers, plan.stages, strict=True):
        planned = stage.index < planned_stages(recipe)
        samples[number] |= set(range(stage.start, stage.stop) if planned else everything)
    if recipe.baseline.enabled:
        samples[0] |= set(everything)
    shares = [len(own) / len(everything) for own in samples]
    return [(shape, share) for shape, share in zip(shapes, shares, strict=True) if share]
