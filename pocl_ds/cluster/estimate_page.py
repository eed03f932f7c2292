"""The page of `pocl estimate`: memory, traffic, hours and disk space of a recipe on a cluster, and
the fields that make it fit. The numbers are those of `recipe_estimate.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pocl_ds.cluster.estimate_evaluation import num_answers, unknown_benchmarks
from pocl_ds.cluster.recipe_estimate import Estimate
from pocl_ds.config import Recipe
from pocl_ds.models import estimate
from pocl_ds.models.cost import ModelShape
from pocl_ds.models.memory import (
    GB,
    TrainingSetup,
    checkpoint_bytes,
    find_largest_micro_batch,
    host_memory,
    scoring_memory,
)
from pocl_ds.runtime.formatting import format_size
from pocl_ds.workflow.step_inputs import evaluated_models


def estimate_lines(sizes: Estimate) -> tuple[list[str], TrainingSetup | None]:
    """The lines of the page, and the setup that fits (None if none fits)."""
    fitting = sizes.largest_setup(sizes.setup)
    setup = fitting or replace(sizes.setup, micro_batch_size=1)
    lines = [
        *_memory_lines(sizes, setup),
        "",
        *_alternative_lines(sizes),
        "",
        *_cost_lines(sizes, setup),
    ]
    if fitting is None:
        lines += [
            "",
            f"IT DOES NOT FIT: micro-batches of one sample need "
            f"{sizes.total_memory(setup) / GB:.1f} GB; use more nodes, or GPUs with more memory",
        ]
    elif changes := _changed_fields(sizes.recipe, fitting):
        fields = " ".join(f"{name}={value}" for name, value in changes.items())
        lines += ["", f"it fits with: {fields}"]
    return lines, fitting


def _memory_lines(sizes: Estimate, setup: TrainingSetup) -> list[str]:
    """The models, and the memory of a rank in training and scoring."""
    recipe, layout, device = sizes.recipe, sizes.assumptions.layout, sizes.assumptions.device
    memory = sizes.memory(setup)
    # The models.
    title = (
        f"{recipe.name} on {layout.nodes} x {layout.ranks_per_node} {device.name}: {layout.ranks} "
        f"ranks, teacher {setup.teacher_mode}{_own_ranks(setup)}; student "
        f"{sizes.student.parameters / 1e6:,.0f} million parameters"
    )
    if sizes.student.adapters:
        title += (
            f" ({sizes.student.trainable_parameters / 1e6:,.1f} million of adapters are trained)"
        )
    if sizes.teacher:
        title += f", teacher {sizes.teacher.parameters / 1e6:,.0f} million"
    # Training.
    lines = [
        title,
        "",
        f"memory of a rank in training, micro-batches of {setup.micro_batch_size} x "
        f"{sizes.work.max_length} tokens",
        *(f"  {name:<32}{size / GB:>9.2f} GB" for name, size in memory.items() if size > 0),
        f"  {'total':<32}{sum(memory.values()) / GB:>9.2f} GB of {device.memory / GB:.0f}",
    ]
    activations = sizes.kept_activations(setup) * layout.ranks / layout.nodes
    if host := host_memory(sizes.student, sizes.teacher, setup, 1 / layout.nodes, activations):
        lines.append(f"  {'host memory of each node':<32}{host / GB:>9.2f} GB")
    # The teacher's ranks.
    if of_teacher := sizes.teacher_rank_memory(setup):
        total = sum(of_teacher.values())
        lines += [
            f"memory of each rank that runs the teacher: {total / GB:.2f} GB",
            *(f"  {name:<32}{size / GB:>9.2f} GB" for name, size in of_teacher.items() if size > 0),
        ]
    # Scoring.
    if not sizes.work.scores_samples:
        return lines
    generation = recipe.score.generation
    scoring = scoring_memory(
        sizes.student,
        generation.dtype,
        device.memory,
        device.base,
        generation.gpu_memory_utilization,
    )
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in scoring.items())
    return [*lines, f"in scoring: {parts}"]


def _own_ranks(setup: TrainingSetup) -> str:
    return f" on {setup.own_teacher_ranks} of them alone" if setup.own_teacher_ranks else ""


def _alternative_lines(sizes: Estimate) -> list[str]:
    """The largest micro-batch that fits with other setups."""
    alternatives: dict[str, dict[str, Any]] = {
        "as configured": {},
        "activation checkpointing": {"checkpointing": True},
        "teacher offloaded": {"offload_teacher": True},
        "both offloaded": {"offload_teacher": True, "offload_student": True},
        "cached hidden states": {"teacher_mode": "cached_hidden_states"},
        "cached states, checkpointing": {
            "teacher_mode": "cached_hidden_states",
            "checkpointing": True,
        },
    }
    lines = [f"{'largest micro-batch that fits':<34}{'samples':>8}{'GB':>8}"]
    for name, changes in alternatives.items():
        if sizes.teacher is None and ("offload_teacher" in changes or "teacher_mode" in changes):
            continue
        setup = replace(sizes.setup, **changes)
        best = sizes.largest_setup(setup, find_largest_micro_batch)
        size = sizes.total_memory(best or replace(setup, micro_batch_size=1))
        lines.append(f"  {name:<32}{best.micro_batch_size if best else 'none':>8}{size / GB:>8.1f}")
    return lines


def _cost_lines(sizes: Estimate, setup: TrainingSetup) -> list[str]:
    """Arithmetic and traffic of an optimizer step, hours, and bytes on disk."""
    assumptions, work, recipe = sizes.assumptions, sizes.work, sizes.recipe
    layout, device = assumptions.layout, assumptions.device

    # One optimizer step.
    lengths = [round(work.tokens)] * work.batch_size
    loss_tokens = round(work.response_tokens * work.batch_size)
    flops = estimate.step_flops(sizes.student, sizes.teacher, setup, lengths, loss_tokens)
    ranks = sizes.student_ranks(setup)
    traffic = estimate.micro_step_traffic(sizes.student, sizes.teacher, setup, ranks)
    micro_steps = max(1, work.batch_size // (setup.micro_batch_size * ranks))
    lines = [
        f"an optimizer step of {work.batch_size} samples ({round(work.tokens)} tokens, "
        f"{round(work.response_tokens)} of the response, on average): {flops / 1e12:,.1f} TFLOP; "
        f"each rank receives {format_size(micro_steps * traffic)} in {micro_steps} micro-steps",
        "",
        f"{work.samples} samples{_left_out(sizes)}, {work.steps} optimizer steps; at "
        f"{100 * assumptions.utilization:.0f}% of {device.flops / 1e12:.0f} TFLOP/s, "
        f"{layout.link(device) / GB:.0f} GB/s between ranks",
        f"  {'':<24}{'hours':>8}{'GPU hours':>11}",
    ]

    # Hours of the steps of a run, and of plain trainings.
    rows = [(t.name, t.seconds, _time_note(sizes, t)) for t in sizes.step_times(setup)]
    rows.append(("POCL in total", sum(seconds for _, seconds, _ in rows), ""))
    for name, plain in _plain_setups(setup, sizes.teacher):
        times = sizes.step_times(plain)
        plain_times = [t for t in times if t.name not in ("score", estimate.RESCORING)]
        seconds = sum(time.seconds for time in plain_times)
        rows.append((name, seconds, "as many sample visits, no scoring"))
    seconds = sum(time.seconds for time in sizes.evaluation_times())
    rows.append(("evaluate", seconds, _evaluation_note(sizes)))
    lines += [
        f"  {name:<24}{hours:>8.2f}{hours * layout.ranks:>11.1f}   {note}".rstrip()
        for name, hours, note in ((name, seconds / 3600, note) for name, seconds, note in rows)
    ]
    rule = sizes.recipe.curriculum.sample_weights
    if rule and sizes.has_unknown_weights:
        lines.append(
            f"curriculum.sample_weights.name={rule.name} may leave samples out and so shorten the "
            "training; how many is not known before the samples are scored"
        )

    # Disk space.
    disk = f"on disk: a checkpoint {format_size(checkpoint_bytes(sizes.student))}"
    if sizes.teacher is not None:
        tokens = work.samples * work.response_tokens
        hidden = replace(setup, teacher_mode="cached_hidden_states")
        hidden_states = sum(
            share * hidden.cached_bytes_per_token(shape) for shape, share in sizes.cached_shares
        )
        most = "at most " if recipe.teacher and recipe.teacher.by_domain else ""
        disk += f"; the teacher's hidden states {most}{format_size(tokens * hidden_states)}"
        if sizes.codec:
            records = tokens * sizes.codec.bytes * sum(share for _, share in sizes.cached_shares)
            disk += f", its {sizes.codec.label} {format_size(records)}"
    return [*lines, "", disk]


def _left_out(sizes: Estimate) -> str:
    """What the weights of samples leave out, as far as that is known."""
    weights = sizes.plan_weights
    if weights is None or weights.all():
        return ""
    return f" ({int((weights == 0).sum())} of them left out by curriculum.sample_weights)"


def _time_note(sizes: Estimate, time: estimate.StepTime) -> str:
    """What bounds a step; of rescoring also its size, which the optimizer steps do not show."""
    note, rescoring = f"bound by {time.bound_by}", sizes.recipe.curriculum.rescoring
    if time.name != estimate.RESCORING or rescoring is None:
        return note
    stages = sizes.recipe.curriculum.num_subsets - rescoring.from_stage + 1
    models = "student and teacher" if sizes.work.rescoring_runs_teacher else "the student"
    return (
        f"{note}; {time.flops / 1e12:,.1f} TFLOP of {models} over {sizes.work.rescored_samples} "
        f"samples before {stages} {'stage' if stages == 1 else 'stages'}"
    )


def _evaluation_note(sizes: Estimate) -> str:
    """What is evaluated, and what is not counted."""
    answers, models = num_answers(sizes.recipe, sizes.samples), evaluated_models(sizes.recipe)
    note = f"{answers} answers by {', '.join(models)}, not in the rows above"
    if unknown := unknown_benchmarks(sizes.recipe, sizes.samples):
        note += f"; without {', '.join(unknown)}"
    return note


def _plain_setups(
    setup: TrainingSetup, teacher: ModelShape | None
) -> list[tuple[str, TrainingSetup]]:
    """The plain trainings that a POCL run is compared with."""
    setups = []
    if teacher is not None:
        setups.append(("plain KD, online teacher", replace(setup, teacher_mode="online")))
        if setup.teacher_mode == "online":
            cached = replace(setup, teacher_mode="cached_hidden_states")
            setups.append(("plain KD, cached states", cached))
    return [*setups, ("plain SFT", replace(setup, teacher_mode="none"))]


def _changed_fields(recipe: Recipe, setup: TrainingSetup) -> dict[str, Any]:
    """Recipe fields of a setup that differ from the recipe."""
    fields: dict[str, Any] = {"train.micro_batch_size": setup.micro_batch_size}
    if setup.checkpointing:
        fields["student.activation_checkpointing"] = "true"
    if setup.offload_student:
        fields["student.ds_config"] = "student_zero3_offload"
    if setup.offload_teacher:
        fields["teacher.ds_config"] = "teacher_zero3_offload"
    tree = recipe.model_dump()
    return {
        name: value
        for name, value in fields.items()
        if str(_field_value(tree, name)).lower() != str(value)
    }


def _field_value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def fitting_overrides(sizes: Estimate, fitting: TrainingSetup) -> list[str]:
    """The overrides that make the recipe fit this cluster."""
    changes = _changed_fields(sizes.recipe, fitting)
    return [
        f"launch.ranks={sizes.student_ranks(fitting)}",
        *(f"{name}={value}" for name, value in changes.items()),
    ]
