"""The cost of a study before it starts: its runs and steps, and the hours of GPUs by the formulas
of `pocl estimate`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from pocl_ds.cluster.estimate_evaluation import unknown_benchmarks
from pocl_ds.cluster.job_graph import nodes_for
from pocl_ds.cluster.profile import Profile
from pocl_ds.cluster.recipe_estimate import Assumptions, Estimate, device_by_name
from pocl_ds.config import Recipe
from pocl_ds.errors import PoclError, RecipeError
from pocl_ds.models.estimate import GPUS, RESCORING, ClusterLayout, Device, find_gpu
from pocl_ds.study.cells import Cell
from pocl_ds.workflow.steps import Step, fingerprints


@dataclass(frozen=True)
class GpuOptions:
    """The GPUs that the command line names: those of a cluster profile, of a type, or of this
    machine.
    """

    gpu: str | None = None  # a name in GPUS, in place of the profile's or this machine's
    profile: Profile | None = None
    nodes: int | None = None

    def device(self) -> Device:
        """The GPU of a rank. Raises RecipeError if it is not known."""
        if self.gpu:
            return device_by_name(self.gpu)
        name: str | None
        if self.profile:
            name = self.profile.gpu_type if self.profile.gpus_per_node else None
            fault = f"profile {self.profile.name} has no gpu_type"
        else:
            name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            fault = "this machine has no GPU"
        if device := find_gpu(name or ""):
            return device
        if name:
            fault = f"it is not known which GPU {name} is"
        raise RecipeError(f"{fault}: name one with --gpu ({', '.join(GPUS)})")

    def layout(self, recipe: Recipe) -> ClusterLayout:
        """The ranks that train a recipe. Raises RecipeError if they do not fill nodes."""
        if self.profile:
            return ClusterLayout(*nodes_for(recipe, self.profile, self.nodes))
        return ClusterLayout(1, recipe.total_ranks)


@dataclass
class Hours:
    """Estimated hours of a study's steps, one after another."""

    hours: float = 0.0
    gpu_hours: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by step
    too_large: list[str] = field(default_factory=list)  # runs whose memory does not suffice
    unknown_benchmarks: dict[str, None] = field(default_factory=dict)


def cost_lines(cells: Sequence[Cell], options: GpuOptions) -> list[str]:
    """The runs, steps and hours of a study, or the reason why its hours cannot be estimated.

    Raises RecipeError if --gpu is unknown.
    """
    if options.gpu:
        device_by_name(options.gpu)
    steps = distinct_steps(cells)
    all_steps = sum(len(cell.steps) for cell in cells)
    own_steps = sum(len(own) for _, own in steps)
    lines = [f"{len(cells)} runs with {all_steps} steps, {own_steps} after sharing equal ones"]
    try:
        device = options.device()
        hours = estimate_hours(steps, device, options)
    except PoclError as error:
        return [*lines, f"hours are not estimated: {error}"]
    layouts = dict.fromkeys(options.layout(cell.recipe) for cell in cells)
    sizes = " or ".join(f"{layout.nodes} x {layout.ranks_per_node}" for layout in layouts)
    parts = ", ".join(f"{step} {value:.1f}" for step, value in hours.gpu_hours.items())
    lines += [
        f"estimate on {sizes} {device.name}: {hours.hours:.1f} hours one run after another, "
        f"{sum(hours.gpu_hours.values()):.1f} GPU hours ({parts})",
        _assumptions(cells, hours),
    ]
    if hours.too_large:
        lines.append(
            f"{len(hours.too_large)} runs need more memory than these GPUs have, the first is "
            f"{hours.too_large[0]}: see `pocl estimate`"
        )
    return lines


def distinct_steps(cells: Sequence[Cell]) -> list[tuple[Cell, list[Step]]]:
    """The steps that each cell has to compute itself, if it links those that an earlier cell has
    computed with the same fingerprint.
    """
    computed: set[tuple[str, str]] = set()
    result = []
    for cell in cells:
        digests = fingerprints(cell.recipe)
        own = [
            step
            for step in cell.steps
            if not step.shareable or (step.name, digests[step.name]) not in computed
        ]
        computed |= {(step.name, digests[step.name]) for step in own}
        result.append((cell, own))
    return result


def estimate_hours(
    steps: Sequence[tuple[Cell, list[Step]]], device: Device, options: GpuOptions
) -> Hours:
    """Hours of the given steps of each cell. Raises PoclError, as `Estimate` does."""
    hours = Hours()
    estimates: dict[str, tuple[Estimate, dict[str, float], bool]] = {}
    for cell, own in steps:
        # The seed changes no estimate.
        key = cell.recipe.model_copy(update={"seed": 0}).model_dump_json()
        if key not in estimates:
            layout = options.layout(cell.recipe)
            estimates[key] = _estimate(cell.recipe, Assumptions(layout, device))
        estimate, seconds, fits = estimates[key]
        for name in [step.name for step in own if step.name in seconds]:
            hours.hours += seconds[name] / 3600
            ranks = estimate.assumptions.layout.ranks
            hours.gpu_hours[name] += seconds[name] / 3600 * ranks
        hours.unknown_benchmarks |= dict.fromkeys(unknown_benchmarks(cell.recipe, estimate.samples))
        if not fits:
            hours.too_large.append(cell.name)
    return hours


def _estimate(recipe: Recipe, assumptions: Assumptions) -> tuple[Estimate, dict[str, float], bool]:
    """Seconds by step with the setup that fits, as `pocl estimate` chooses it, and whether one
    does.
    """
    estimate = Estimate(recipe, assumptions)
    fitting = estimate.largest_setup(estimate.setup)
    setup = fitting or replace(estimate.setup, micro_batch_size=1)
    seconds: dict[str, float] = defaultdict(float)
    for time in (*estimate.step_times(setup), *estimate.evaluation_times()):
        # The student ranks samples again as a part of the training.
        seconds["train" if time.name == RESCORING else time.name] += time.seconds
    return estimate, dict(seconds), fitting is not None


def _assumptions(cells: Sequence[Cell], hours: Hours) -> str:
    """What the hours are of, and what they leave out."""
    omitted = ["other steps"]
    if any(cell.recipe.policy.on_policy for cell in cells):
        omitted.append("responses that students generate during training")
    if hours.unknown_benchmarks:
        omitted.append(f"answers to {', '.join(hours.unknown_benchmarks)}")
    return (
        "by the formulas and default assumptions of `pocl estimate`; not included: "
        f"{'; '.join(omitted)}"
    )
