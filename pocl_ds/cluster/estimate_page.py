"""The page of `pocl estimate`: memory, traffic, hours and disk space of a recipe on a cluster, and
the fields that make it fit. The formulas are in `models/memory.py` and `models/estimate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pocl_ds.config import ModelSource, Recipe, StudentConfig
from pocl_ds.curriculum.plan_step import plan_from_config
from pocl_ds.errors import RecipeError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.models import estimate
from pocl_ds.models.cost import ModelShape, activation_bytes, model_shape
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.estimate import GPUS, ClusterLayout, Device, TrainingWork
from pocl_ds.models.load import load_model_config, resolve_model
from pocl_ds.models.memory import (
    GB,
    TrainingSetup,
    checkpoint_bytes,
    find_fitting_setup,
    find_largest_micro_batch,
    host_memory,
    scoring_memory,
    training_memory,
)
from pocl_ds.models.prune import parse_layers, prune_config
from pocl_ds.models.quantization import bytes_per_weight
from pocl_ds.teachers.codecs import build_codec
from pocl_ds.workflow.step_inputs import teacher_temperatures

# Means of the paper's 11,435 instruction samples, in tokens of GPT-2.
SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 11_435, 122.0, 35.0
# Activations are measured at these two lengths; they grow linearly with the number of tokens.
MEASURED_LENGTHS = (64, 128)


@dataclass(frozen=True)
class Assumptions:
    """What the command line adds to the recipe."""

    layout: ClusterLayout
    device: Device
    samples: int = SAMPLES
    prompt_tokens: float = PROMPT_TOKENS
    response_tokens: float = RESPONSE_TOKENS
    utilization: float = 0.4  # share of the GPU's peak that arithmetic reaches


class Estimate:
    """A recipe's two models on a cluster."""

    def __init__(self, recipe: Recipe, assumptions: Assumptions) -> None:
        self.recipe, self.assumptions = recipe, assumptions
        self.student_config = _model_config(recipe.student)
        self.student = model_shape(self.student_config, recipe.student.lora)
        self.teacher_config = _model_config(recipe.teacher) if recipe.teacher else None
        self.teacher: ModelShape | None = (
            model_shape(self.teacher_config) if recipe.teacher else None
        )
        # Further teachers in memory; of those by stage only one is, the largest at the peak.
        self.other_teachers = [model_shape(_model_config(m)) for m in _other_teachers(recipe)]
        if self.teacher and recipe.teacher and recipe.teacher.by_stage:
            shapes = [self.teacher, *self.other_teachers]
            self.teacher = max(shapes, key=lambda shape: shape.parameters)
            self.other_teachers = []

    @cached_property
    def work(self) -> TrainingWork:
        """The samples and optimizer steps of the recipe's plan."""
        recipe, assumptions = self.recipe, self.assumptions
        samples = min(assumptions.samples, recipe.data.max_train_samples or assumptions.samples)
        plan = plan_from_config(
            range(samples), recipe.curriculum, batch_size=recipe.train.batch_size
        )
        return TrainingWork(
            samples,
            assumptions.prompt_tokens,
            assumptions.response_tokens,
            recipe.prompt.max_length,
            recipe.train.batch_size,
            plan.total_steps,
        )

    @cached_property
    def codec(self) -> RecordCodec | None:
        """The codec of the teacher's cached records."""
        recipe, mode = self.recipe, self.recipe.teacher.mode if self.recipe.teacher else "none"
        temperatures = teacher_temperatures(recipe)
        return build_codec(mode, recipe.teacher_cache, self.student.rows, temperatures)

    @cached_property
    def setup(self) -> TrainingSetup:
        """The recipe's own choices about memory."""
        recipe, teacher = self.recipe, self.recipe.teacher
        mode = "none" if teacher is None else "online" if teacher.mode == "auto" else teacher.mode
        return TrainingSetup(
            micro_batch_size=recipe.train.micro_batch_size,
            checkpointing=recipe.student.activation_checkpointing,
            offload_student="offload" in recipe.student.ds_config,
            teacher_mode=mode,
            dtype=recipe.student.dtype,
            offload_teacher=teacher is not None and "offload" in (teacher.ds_config or ""),
            teacher_dtype=teacher.dtype if teacher else recipe.student.dtype,
            sharded=recipe.train.engine == "deepspeed",
            teacher_sharded=teacher is not None and teacher.ds_config is not None,
            chunk_bytes=recipe.loss.chunk_bytes,
            teacher_bytes_per_weight=bytes_per_weight(self.teacher_config, teacher.quantization)
            if teacher
            else None,
            record_bytes=self.codec.bytes if self.codec else 0,
        )

    def activations(self, lengths: Sequence[int], checkpointing: bool) -> float:
        """Bytes that a micro-batch of these lengths keeps for its backward pass."""
        (short, short_bytes), (long, long_bytes) = self._measured_activations[checkpointing]
        bytes_per_token = (long_bytes - short_bytes) / (long - short)
        return short_bytes + bytes_per_token * (sum(lengths) - short)

    @cached_property
    def _measured_activations(self) -> dict[bool, list[tuple[int, int]]]:
        """With and without checkpointing: (length, bytes) at both measured lengths."""
        student = self.recipe.student

        def measure(length: int, checkpointing: bool) -> int:
            return activation_bytes(
                self.student_config,
                [length],
                dtype=getattr(torch, resolve_dtype(student.dtype, torch.device("cuda"))),
                attention=student.attn_implementation,
                checkpointing=checkpointing,
                dropout=student.dropout,
                lora=student.lora,
            )

        return {
            checkpointing: [(length, measure(length, checkpointing)) for length in MEASURED_LENGTHS]
            for checkpointing in (False, True)
        }

    def memory(self, setup: TrainingSetup) -> dict[str, float]:
        """Bytes of one rank by their use, if all samples have the maximum length."""
        lengths = [self.work.max_length] * setup.micro_batch_size
        loss_tokens = setup.micro_batch_size * (self.work.max_length - 1)
        ranks = self.assumptions.layout.ranks
        memory = training_memory(
            self.student,
            self.teacher,
            setup,
            ranks,
            lengths,
            loss_tokens,
            self.activations,
            self.assumptions.device.base,
        )
        if self.other_teachers and setup.teacher_mode == "online" and not setup.offload_teacher:
            weights = sum(setup.teacher_weights(shape) for shape in self.other_teachers)
            memory["other teachers: weights"] = weights / (ranks if setup.teacher_sharded else 1)
        return memory

    def total_memory(self, setup: TrainingSetup) -> float:
        """Bytes of one rank."""
        return sum(self.memory(setup).values())

    def largest_setup(
        self,
        setup: TrainingSetup,
        search: Callable[..., TrainingSetup | None] = find_fitting_setup,
    ) -> TrainingSetup | None:
        """The setup with the largest micro-batch that fits; None if none fits.

        By default the search may also change checkpointing and offloading;
        `find_largest_micro_batch` changes nothing else.
        """
        most = max(1, self.work.batch_size // self.assumptions.layout.ranks)
        return search(
            self.total_memory,
            setup,
            self.assumptions.device.memory,
            most,
            self.work.batch_size,
            self.assumptions.layout.ranks,
        )


def _other_teachers(recipe: Recipe) -> list[ModelSource]:
    """The models of section `teacher` besides the first, each once."""
    sources = recipe.teacher.sources if recipe.teacher else ()
    return list({source.label: source for source in sources}.values())[1:]


def _model_config(model: ModelSource) -> Any:
    """A model's configuration, without the layers that the recipe prunes."""
    config = load_model_config(
        resolve_model(model), trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    if isinstance(model, StudentConfig) and model.prune:
        dropped = set(parse_layers(model.prune.drop_layers))
        layers = [layer for layer in range(config.num_hidden_layers) if layer not in dropped]
        if not layers:
            raise RecipeError(
                f"student.prune.drop_layers={model.prune.drop_layers} drops every layer: drop fewer"
            )
        prune_config(config, layers)
    return config


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
        f"ranks, teacher {setup.teacher_mode}; student "
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
    if host := host_memory(sizes.student, sizes.teacher, setup, 1 / layout.nodes):
        lines.append(f"  {'host memory of each node':<32}{host / GB:>9.2f} GB")
    # Scoring.
    generation = recipe.score.generation
    scoring = scoring_memory(
        sizes.student,
        generation.dtype,
        device.memory,
        device.base,
        generation.gpu_memory_utilization,
    )
    parts = ", ".join(f"{name} {size / GB:.1f} GB" for name, size in scoring.items())
    return [*lines, f"in scoring: {parts}"]


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
    assumptions, work = sizes.assumptions, sizes.work
    layout, device = assumptions.layout, assumptions.device

    # One optimizer step.
    lengths = [round(work.tokens)] * work.batch_size
    loss_tokens = round(work.response_tokens * work.batch_size)
    flops = estimate.step_flops(sizes.student, sizes.teacher, setup, lengths, loss_tokens)
    traffic = estimate.micro_step_traffic(sizes.student, sizes.teacher, setup, layout.ranks)
    micro_steps = max(1, work.batch_size // (setup.micro_batch_size * layout.ranks))
    lines = [
        f"an optimizer step of {work.batch_size} samples ({round(work.tokens)} tokens, "
        f"{round(work.response_tokens)} of the response, on average): {flops / 1e12:,.1f} TFLOP; "
        f"each rank receives {micro_steps * traffic / GB:.2f} GB in {micro_steps} micro-steps",
        "",
        f"{work.samples} samples, {work.steps} optimizer steps; at "
        f"{100 * assumptions.utilization:.0f}% of {device.flops / 1e12:.0f} TFLOP/s, "
        f"{layout.link(device) / GB:.0f} GB/s between ranks",
        f"  {'':<24}{'hours':>8}{'GPU hours':>11}",
    ]

    # Hours of the steps of a run, and of plain trainings.
    rows = [(t.name, t.seconds, f"bound by {t.bound_by}") for t in _step_times(sizes, setup)]
    rows.append(("POCL in total", sum(seconds for _, seconds, _ in rows), ""))
    for name, plain in _plain_setups(setup, sizes.teacher):
        times = _step_times(sizes, plain)
        seconds = sum(time.seconds for time in times if time.name != "score")
        rows.append((name, seconds, "as many sample visits, no scoring"))
    lines += [
        f"  {name:<24}{hours:>8.2f}{hours * layout.ranks:>11.1f}   {note}".rstrip()
        for name, hours, note in ((name, seconds / 3600, note) for name, seconds, note in rows)
    ]

    # Disk space.
    disk = f"on disk: a checkpoint {checkpoint_bytes(sizes.student) / GB:.1f} GB"
    if sizes.teacher is not None:
        tokens = work.samples * work.response_tokens
        hidden_states = replace(setup, teacher_mode="cached_hidden_states").cached_bytes_per_token(
            sizes.teacher
        )
        disk += f"; the teacher's hidden states {tokens * hidden_states / GB:.2f} GB"
        if sizes.codec:
            disk += f", its {sizes.codec.label} {tokens * sizes.codec.bytes / GB:.2f} GB"
    return [*lines, "", disk]


def _step_times(sizes: Estimate, setup: TrainingSetup) -> list[estimate.StepTime]:
    """Seconds of each workflow step that takes long."""
    assumptions, score = sizes.assumptions, sizes.recipe.score
    return estimate.step_times(
        sizes.student,
        sizes.teacher,
        setup,
        sizes.work,
        assumptions.layout,
        assumptions.device,
        utilization=assumptions.utilization,
        max_new_tokens=score.max_new_tokens,
        sequences=score.generation.max_num_seqs,
    )


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
        f"launch.ranks={sizes.assumptions.layout.ranks}",
        *(f"{name}={value}" for name, value in changes.items()),
    ]


def device_by_name(name: str) -> Device:
    """A GPU by its name. Raises RecipeError for an unknown one."""
    if name not in GPUS:
        raise RecipeError(f"--gpu {name}: choose one of {', '.join(GPUS)}")
    return GPUS[name]
