"""`pocl estimate`: from a recipe and a cluster to a page of numbers (see `sizing`), and a recipe with
its missing ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pocl_ds.config import ModelConfig, Recipe, StudentConfig
from pocl_ds.curriculum.plan_step import plan_from_config
from pocl_ds.errors import RecipeError
from pocl_ds.losses.top_k import TopK
from pocl_ds.models import estimate
from pocl_ds.models.cost import ModelShape, activation_bytes, model_shape
from pocl_ds.models.estimate import GB, GPUS, ClusterLayout, Device, TrainingSetup, TrainingWork
from pocl_ds.models.load import load_model_config, resolve_model
from pocl_ds.models.prune import parse_layers, prune_config
from pocl_ds.models.quantization import bytes_per_weight
from pocl_ds.workflow.step_inputs import teacher_temperatures

# Means over 11,000 instruction samples as in the paper, by GPT-2's tokenizer; the command line can
# say otherwise.
SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 11_435, 122.0, 35.0
SHORT = (64, 128)  # lengths that activations are measured at; they grow with the number of tokens


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the recipe."""

    layout: ClusterLayout
    device: Device
    samples: int = SAMPLES
    prompt_tokens: float = PROMPT_TOKENS
    response_tokens: float = RESPONSE_TOKENS
    utilisation: float = 0.4


class Sizes:
    """A recipe's two models on a cluster."""

    def __init__(self, recipe: Recipe, asked: Asked) -> None:
        self.recipe, self.asked = recipe, asked
        self.student_config = _config(recipe.student)
        self.student = model_shape(self.student_config, recipe.student.lora)
        self.teacher_config = _config(recipe.teacher) if recipe.teacher else None
        self.teacher: ModelShape | None = (
            model_shape(self.teacher_config) if recipe.teacher else None
        )

    @cached_property
    def work(self) -> TrainingWork:
        """What is trained on, by the recipe's plan."""
        recipe, asked = self.recipe, self.asked
        samples = min(asked.samples, recipe.data.max_train_samples or asked.samples)
        steps = plan_from_config(
            range(samples), recipe.curriculum, batch_size=recipe.train.batch_size
        ).total_steps
        return TrainingWork(
            samples,
            asked.prompt_tokens,
            asked.response_tokens,
            recipe.prompt.max_length,
            recipe.train.batch_size,
            steps,
        )

    @cached_property
    def choice(self) -> TrainingSetup:
        """What the recipe says now."""
        recipe, teacher = self.recipe, self.recipe.teacher
        mode = "none" if teacher is None else "online" if teacher.mode == "auto" else teacher.mode
        records = TopK(
            recipe.teacher_cache.top_k, self.student.rows, teacher_temperatures(recipe)
        ).bytes
        return TrainingSetup(
            micro_batch_size=recipe.train.micro_batch_size,
            checkpointing=recipe.student.activation_checkpointing,
            offload_student="offload" in recipe.student.ds_config,
            mode=mode,
            dtype=recipe.student.dtype,
            offload_teacher=teacher is not None and "offload" in (teacher.ds_config or ""),
            teacher_dtype=teacher.dtype if teacher else recipe.student.dtype,
            sharded=recipe.train.engine == "deepspeed",
            teacher_sharded=teacher is not None and teacher.ds_config is not None,
            chunk_bytes=recipe.loss.chunk_bytes,
            teacher_quantised=bytes_per_weight(self.teacher_config, teacher.quantization)
            if teacher
            else None,
            record_bytes=records,
        )

    def activations(self, lengths: Sequence[int], checkpointing: bool) -> float:
        """Bytes that a micro-batch of these lengths keeps for backward: in proportion to its
        tokens.
        """
        (first, low), (second, high) = self._activations[checkpointing]
        slope = (high - low) / (second - first)
        return low + slope * (sum(lengths) - first)

    @cached_property
    def _activations(self) -> dict[bool, list[tuple[int, int]]]:
        recipe = self.recipe.student
        return {
            checkpointing: [
                (
                    length,
                    activation_bytes(
                        self.student_config,
                        [length],
                        dtype=getattr(torch, recipe.dtype),
                        attention=recipe.attn_implementation,
                        checkpointing=checkpointing,
                        dropout=recipe.dropout,
                        lora=recipe.lora,
                    ),
                )
                for length in SHORT
            ]
            for checkpointing in (False, True)
        }

    def memory(self, choice: TrainingSetup) -> dict[str, float]:
        """Bytes of one rank, by what holds them, where every sample of a micro-batch is as long as
        may be.
        """
        lengths = [self.work.max_length] * choice.micro_batch_size
        loss_tokens = choice.micro_batch_size * (self.work.max_length - 1)
        return estimate.training_memory(
            self.student,
            self.teacher,
            choice,
            self.asked.layout.ranks,
            lengths,
            loss_tokens,
            self.activations,
            self.asked.device.base,
        )

    def total(self, choice: TrainingSetup) -> float:
        """Bytes of one rank."""
        return sum(self.memory(choice).values())

    def fitting(
        self,
        choice: TrainingSetup,
        search: Callable[..., TrainingSetup | None] = estimate.find_fitting_setup,
    ) -> TrainingSetup | None:
        """The largest micro-batch that fits, with as little else changed as possible, or with
        search=largest nothing else.
        """
        most = max(1, self.work.batch_size // self.asked.layout.ranks)
        return search(
            self.total,
            choice,
            self.asked.device.memory,
            most,
            self.work.batch_size,
            self.asked.layout.ranks,
        )


def _config(model: ModelConfig) -> Any:
    """A model's configuration; the student's without the layers that the recipe prunes."""
    config = load_model_config(
        resolve_model(model), trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    if isinstance(model, StudentConfig) and model.prune:
        dropped = set(parse_layers(model.prune.drop_layers))
        kept = [layer for layer in range(config.num_hidden_layers) if layer not in dropped]
        if not kept:
            raise RecipeError(
                f"student.prune.drop_layers={model.prune.drop_layers} leaves no layer: drop fewer"
            )
        prune_config(config, kept)
    return config


def page(sizes: Sizes) -> tuple[list[str], TrainingSetup | None]:
    """The page, and the choice that fits (None where nothing does)."""
    recipe, layout, device = sizes.recipe, sizes.asked.layout, sizes.asked.device
    found = sizes.fitting(sizes.choice)
    shown = found or replace(sizes.choice, micro_batch_size=1)
    memory = sizes.memory(shown)
    lines = [
        f"{recipe.name} on {layout.nodes} x {layout.ranks_per_node} {device.name}: {layout.ranks} "
        f"ranks, teacher "
        f"{shown.mode}; student {sizes.student.parameters / 1e6:,.0f} million parameters"
        + (
            f", {sizes.student.trained / 1e6:,.1f} million of adapters are trained"
            if sizes.student.adapters
            else ""
        )
        + (f", teacher {sizes.teacher.parameters / 1e6:,.0f} million" if sizes.teacher else ""),
        "",
        f"memory of a rank in training, micro-batches of {shown.micro_batch_size} x "
        f"{sizes.work.max_length} tokens",
        *(f"  {name:<26}{size / GB:>9.2f} GB" for name, size in memory.items() if size > 0),
        f"  {'together':<26}{sum(memory.values()) / GB:>9.2f} GB of {device.memory / GB:.0f}",
    ]
    if host := estimate.host_memory(sizes.student, sizes.teacher, shown, layout):
        lines.append(f"  {'in the memory of each node':<26}{host / GB:>9.2f} GB")
    generation = recipe.score.generation
    scoring = estimate.scoring_memory(
        sizes.student, generation.dtype, device, generation.gpu_memory_utilization
    )
    lines.append(
        "in scoring: " + ", ".join(f"{name} {size / GB:.1f} GB" for name, size in scoring.items())
    )
    lines += ["", *_variants(sizes)]
    lines += ["", *_costs(sizes, shown)]
    if found is None:
        lines += [
            "",
            f"IT DOES NOT FIT: {sizes.total(shown) / GB:.1f} GB are needed with micro-batches of "
            f"one sample; take more "
            "nodes, or GPUs of more memory",
        ]
    elif changed := _changes(recipe, found):
        lines += [
            "",
            "it fits with: " + " ".join(f"{name}={value}" for name, value in changed.items()),
        ]
    return lines, found


def _variants(sizes: Sizes) -> list[str]:
    """What else would fit: the largest micro-batch of each way."""
    ways = {
        "as it is": {},
        "activation checkpointing": {"checkpointing": True},
        "teacher offloaded": {"offload_teacher": True},
        "both offloaded": {"offload_teacher": True, "offload_student": True},
        "hidden states kept": {"mode": "cached_hidden_states"},
        "hidden states, checkpointing": {"mode": "cached_hidden_states", "checkpointing": True},
    }
    lines = [f"{'largest micro-batch that fits':<34}{'samples':>8}{'GB':>8}"]
    for name, changes in ways.items():
        if sizes.teacher is None and ("teacher" in name or "cached_hidden_states" in name):
            continue
        tried = replace(sizes.choice, **changes)  # type: ignore[arg-type]
        best = sizes.fitting(tried, estimate.find_largest_micro_batch)
        need = sizes.total(best or replace(tried, micro_batch_size=1))
        lines.append(f"  {name:<32}{best.micro_batch_size if best else 'none':>8}{need / GB:>8.1f}")
    return lines


def _costs(sizes: Sizes, choice: TrainingSetup) -> list[str]:
    """Arithmetic, traffic, hours and bytes on disk."""
    asked, work, layout = sizes.asked, sizes.work, sizes.asked.layout
    lengths, loss = (
        [round(work.tokens)] * work.batch_size,
        round(work.response_tokens * work.batch_size),
    )
    flops = estimate.step_flops(sizes.student, sizes.teacher, choice, lengths, loss)
    traffic = estimate.micro_step_traffic(sizes.student, sizes.teacher, choice, layout.ranks)
    micro = max(1, work.batch_size // (choice.micro_batch_size * layout.ranks))
    lines = [
        f"a step of {work.batch_size} samples ({round(work.tokens)} tokens, "
        f"{round(work.response_tokens)} of the response, on "
        f"average): {flops / 1e12:,.1f} TFLOP; each rank receives {micro * traffic / GB:.2f} GB "
        f"in {micro} micro-steps",
        "",
        f"{work.samples} samples, {work.steps} steps; at {100 * asked.utilisation:.0f}% of "
        f"{asked.device.flops / 1e12:.0f} "
        f"TFLOP/s, {layout.link(asked.device) / GB:.0f} GB/s between ranks",
        f"  {'':<24}{'hours':>8}{'GPU hours':>11}",
    ]
    recipe = sizes.recipe
    arguments: dict[str, Any] = {
        "utilisation": asked.utilisation,
        "max_new_tokens": recipe.score.max_new_tokens,
        "sequences": recipe.score.generation.max_num_seqs,
    }
    times = estimate.step_times(
        sizes.student, sizes.teacher, choice, work, layout, asked.device, **arguments
    )
    rows = [(time.name, time.seconds, f"bound by {time.why}") for time in times]
    rows.append(("POCL, all of it", sum(time.seconds for time in times), ""))
    for name, other in _beside(choice, sizes.teacher):
        alone = estimate.step_times(
            sizes.student, sizes.teacher, other, work, layout, asked.device, **arguments
        )
        seconds = sum(time.seconds for time in alone if time.name != "score")
        rows.append((name, seconds, "as many sample visits, no scoring"))
    lines += [
        f"  {name:<24}{seconds / 3600:>8.2f}{seconds * layout.ranks / 3600:>11.1f}   {why}".rstrip()
        for name, seconds, why in rows
    ]
    lines += ["", f"on disk: a checkpoint {estimate.checkpoint_bytes(sizes.student) / GB:.1f} GB"]
    if sizes.teacher is not None:
        kept = work.samples * work.response_tokens * sizes.choice.teacher_width(sizes.teacher)
        hidden = (
            work.samples
            * work.response_tokens
            * replace(choice, mode="cached_hidden_states").teacher_width(sizes.teacher)
        )
        lines[-1] += f"; the teacher's hidden states {hidden / GB:.2f} GB"
        lines[-1] += (
            f", its top-{recipe.teacher_cache.top_k} lists {kept / GB:.2f} GB"
            if sizes.choice.mode == "cached_topk"
            else ""
        )
    return lines


def _beside(choice: TrainingSetup, teacher: ModelShape | None) -> list[tuple[str, TrainingSetup]]:
    """What a POCL run is compared with."""
    found = [("plain SFT", replace(choice, mode="none"))]
    if teacher is not None:
        found.insert(0, ("plain KD, live teacher", replace(choice, mode="online")))
        if choice.mode == "online":
            found.insert(
                1, ("plain KD, hidden states", replace(choice, mode="cached_hidden_states"))
            )
    return found


def _changes(recipe: Recipe, found: TrainingSetup) -> dict[str, Any]:
    """Recipe fields that the fitting choice sets, where the recipe says otherwise."""
    wanted: dict[str, Any] = {"train.micro_batch_size": found.micro_batch_size}
    if found.checkpointing:
        wanted["student.activation_checkpointing"] = "true"
    if found.offload_student:
        wanted["student.ds_config"] = "student_zero3_offload"
    if found.offload_teacher:
        wanted["teacher.ds_config"] = "teacher_zero3_offload"
    tree = recipe.model_dump()
    return {
        name: value
        for name, value in wanted.items()
        if str(_value(tree, name)).lower() != str(value)
    }


def _value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def numbers(sizes: Sizes, found: TrainingSetup) -> list[str]:
    """The overrides that make the recipe fit this cluster."""
    return [
        f"launch.ranks={sizes.asked.layout.ranks}",
        *(f"{n}={v}" for n, v in _changes(sizes.recipe, found).items()),
    ]


def device_of(name: str) -> Device:
    """A GPU by its name. Raises RecipeError for one that is not known."""
    if name not in GPUS:
        raise RecipeError(f"--gpu {name}: take one of {', '.join(GPUS)}")
    return GPUS[name]
