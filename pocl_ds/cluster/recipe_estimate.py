"""The models of a recipe on a cluster: their memory, and the samples and optimizer steps of a plan.
The formulas are in `models/memory.py` and `models/estimate.py`, the page in `estimate_page.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.cluster.estimate_evaluation import num_answers
from pocl_ds.cluster.estimate_teachers import cached_shares, other_teachers
from pocl_ds.config import ModelSource, Recipe, StudentConfig
from pocl_ds.config.curriculum_checks import rescoring_runs_teacher
from pocl_ds.curriculum.plan import Plan
from pocl_ds.curriculum.plan_step import plan_from_config
from pocl_ds.curriculum.sample_scores import SampleScores, places
from pocl_ds.curriculum.sample_weights import weigh_samples
from pocl_ds.errors import RecipeError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.models.cost import ModelShape, activation_bytes, model_shape, parameter_bytes
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.estimate import (
    GPUS,
    ClusterLayout,
    Device,
    GenerationWork,
    StepTime,
    TrainingWork,
    generation_time,
    step_times,
)
from pocl_ds.models.load import load_model_config, resolve_model
from pocl_ds.models.memory import (
    TrainingSetup,
    find_fitting_setup,
    teacher_rank_memory,
    training_memory,
)
from pocl_ds.models.prune import parse_layers, prune_config
from pocl_ds.models.quantization import bytes_per_weight
from pocl_ds.teachers.codecs import build_codec
from pocl_ds.workflow.step_inputs import evaluated_models, teacher_temperatures

# Means of the paper's 11,435 instruction samples, in tokens of GPT-2.
SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 11_435, 122.0, 35.0
# Activations are measured at these two lengths; they grow linearly with the number of tokens.
MEASURED_LENGTHS = (64, 128)
MEASURED_TILE = 16  # tokens of a tile there, if MLPs are tiled: what a tile keeps is left out


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
        teacher = recipe.local_teacher
        self.teacher_config = _model_config(teacher) if teacher else None
        self.teacher: ModelShape | None = model_shape(self.teacher_config) if teacher else None
        # Further teachers in memory; of those by stage only one is, the largest at the peak.
        self.other_teachers = [model_shape(_model_config(m)) for m in other_teachers(recipe)]
        self._teachers = [*([self.teacher] if self.teacher else []), *self.other_teachers]
        if recipe.teacher and recipe.teacher.by_stage:
            self.teacher = max(self._teachers, key=lambda shape: shape.parameters)
            self.other_teachers = []

    @cached_property
    def samples(self) -> int:
        """The training samples."""
        assumed, limit = self.assumptions.samples, self.recipe.data.max_train_samples
        return min(assumed, limit or assumed)

    @cached_property
    def plan_weights(self) -> NDArray[np.float32] | None:
        """The weights of the samples in the plan, [samples], if they follow from places in the
        ranking; other rules need scores, and rescoring before the first stage changes no plan.
        """
        curriculum, rule = self.recipe.curriculum, self.recipe.curriculum.sample_weights
        if rule is None or not curriculum.plan_has_weights or rule.scores != ("place",):
            return None
        rows = np.arange(self.samples)
        scores = SampleScores(rows.astype(np.bytes_), {"place": places(rows)})
        return weigh_samples(scores, rule.name, rule.options)

    @property
    def has_unknown_weights(self) -> bool:
        """Whether the plan may leave out samples that only their scores will tell."""
        return self.recipe.curriculum.plan_has_weights and self.plan_weights is None

    @cached_property
    def plan(self) -> Plan:
        """The recipe's plan for the assumed number of samples."""
        return plan_from_config(
            np.arange(self.samples),
            self.recipe.curriculum,
            batch_size=self.recipe.train.batch_size,
            sample_weights=self.plan_weights,
        )

    @cached_property
    def cached_shares(self) -> list[tuple[ModelShape, float]]:
        """See `estimate_teachers`."""
        return cached_shares(self.recipe, self._teachers, self.plan)

    @cached_property
    def work(self) -> TrainingWork:
        """The samples and optimizer steps of the recipe's plan, and what ranks the samples."""
        recipe, assumptions, curriculum = self.recipe, self.assumptions, self.recipe.curriculum
        rescoring = curriculum.rescoring
        rescored = 0
        if rescoring:
            stages = range(curriculum.num_subsets)
            rescored = sum(rescoring.samples_to_score(self.samples, stage) for stage in stages)
        return TrainingWork(
            self.samples,
            assumptions.prompt_tokens,
            assumptions.response_tokens,
            recipe.prompt.max_length,
            recipe.train.batch_size,
            self.plan.total_steps,
            scores_samples=recipe.scores_samples,
            rescored_samples=rescored,
            rescoring_runs_teacher=rescoring is not None
            and rescoring_runs_teacher(
                rescoring, curriculum.sample_weights, recipe.loss, recipe.teacher
            ),
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
        recipe, teacher = self.recipe, self.recipe.local_teacher
        mode = (
            "online" if teacher and teacher.mode == "auto" else teacher.mode if teacher else "none"
        )
        if recipe.loss.name == "sft":  # on the data, or on the teacher's responses
            mode = "none"
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
            hidden_dtype=recipe.teacher_cache.hidden_dtype,
            record_bytes=self.codec.bytes if self.codec else 0,
            teacher_ranks=recipe.teacher_ranks,
            sequence_parallel_size=recipe.train.sequence_parallel_size,
            offload_activations=recipe.student.activation_offloading,
        )

    def student_ranks(self, setup: TrainingSetup) -> int:
        """Ranks of the student: all but those that run the teacher alone. Raises RecipeError if
        none is left, or if they do not make equal groups.
        """
        ranks = self.assumptions.layout.ranks
        if ranks <= setup.own_teacher_ranks:
            raise RecipeError(
                f"teacher.ranks={setup.own_teacher_ranks} leaves no GPU for the student of "
                f"{ranks}: lower it, or give more nodes"
            )
        size = setup.sequence_parallel_size
        if ranks % size:
            raise RecipeError(
                f"train.sequence_parallel_size={size} does not divide {ranks} GPUs into groups: "
                "lower it, or give other nodes"
            )
        return ranks - setup.own_teacher_ranks

    def activations(self, lengths: Sequence[int], checkpointing: bool) -> float:
        """Bytes that a micro-batch of these lengths keeps for its backward pass."""
        (short, short_bytes), (long, long_bytes) = _measure_activations(
            self.recipe.student.model_dump_json(), self.recipe.train.mlp_tile_tokens is not None
        )[checkpointing]
        bytes_per_token = (long_bytes - short_bytes) / (long - short)
        return short_bytes + bytes_per_token * (sum(lengths) - short)

    def kept_activations(self, setup: TrainingSetup) -> float:
        """Bytes that a rank keeps for its backward pass, if all samples have the maximum length."""
        tokens = self.work.max_length * setup.micro_batch_size / setup.sequence_parallel_size
        return self.activations([round(tokens)], setup.checkpointing)

    def memory(self, setup: TrainingSetup) -> dict[str, float]:
        """Bytes of one rank by their use, if all samples have the maximum length."""
        lengths = [self.work.max_length] * setup.micro_batch_size
        loss_tokens = setup.micro_batch_size * (self.work.max_length - 1)
        ranks = self.student_ranks(setup)
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
        has_heads = setup.teacher_mode == "cached_hidden_states" or setup.own_teacher_ranks
        if setup.teacher_mode == "online" and not setup.own_teacher_ranks:
            memory |= self._other_weights(setup, ranks)
        if self.other_teachers and has_heads:
            heads = sum(shape.head_parameters for shape in self.other_teachers)
            memory["other teachers: heads"] = parameter_bytes(heads, setup.teacher_dtype)
        return memory

    def _other_weights(self, setup: TrainingSetup, ranks: int) -> dict[str, float]:
        """Bytes of further online teachers on each of `ranks` ranks."""
        if not self.other_teachers or setup.offload_teacher:
            return {}
        weights = sum(setup.teacher_weights(shape) for shape in self.other_teachers)
        return {"other teachers: weights": weights / (ranks if setup.teacher_sharded else 1)}

    def teacher_rank_memory(self, setup: TrainingSetup) -> dict[str, float]:
        """Bytes of a rank that runs the teacher alone, by their use; empty without such ranks."""
        if self.teacher is None or not setup.own_teacher_ranks:
            return {}
        lengths = [self.work.max_length] * setup.micro_batch_size
        memory = teacher_rank_memory(self.teacher, setup, lengths, self.assumptions.device.base)
        return memory | self._other_weights(setup, setup.own_teacher_ranks)

    def total_memory(self, setup: TrainingSetup) -> float:
        """Bytes of the fullest rank."""
        parts = self.memory(setup), self.teacher_rank_memory(setup)
        return max(sum(memory.values()) for memory in parts)

    def largest_setup(
        self,
        setup: TrainingSetup,
        search: Callable[..., TrainingSetup | None] = find_fitting_setup,
    ) -> TrainingSetup | None:
        """The setup with the largest micro-batch that fits; None if none fits.

        By default the search may also change checkpointing and offloading;
        `find_largest_micro_batch` changes nothing else.
        """
        ranks = self.student_ranks(setup)
        groups = ranks // setup.sequence_parallel_size
        most = max(1, self.work.batch_size // groups)
        return search(
            self.total_memory,
            setup,
            self.assumptions.device.memory,
            most,
            self.work.batch_size,
            groups,
        )

    def step_times(self, setup: TrainingSetup) -> list[StepTime]:
        """Seconds of the steps up to the training that take long."""
        assumptions, score = self.assumptions, self.recipe.score
        return step_times(
            self.student,
            self.teacher,
            setup,
            self.work,
            assumptions.layout,
            assumptions.device,
            utilization=assumptions.utilization,
            max_new_tokens=score.max_new_tokens,
            sequences=score.generation.max_num_seqs,
            cached_shares=self.cached_shares,
        )

    def evaluation_times(self) -> list[StepTime]:
        """Seconds of each model's answers to the benchmarks whose size is known."""
        assumptions, evaluate = self.assumptions, self.recipe.evaluate
        work = GenerationWork(
            num_answers(self.recipe, self.samples),
            assumptions.prompt_tokens,
            evaluate.max_new_tokens,
            evaluate.generation.max_num_seqs,
        )
        return [
            generation_time(
                "evaluate",
                self.teacher if name == "teacher" and self.teacher else self.student,
                work,
                assumptions.layout,
                assumptions.device,
                assumptions.device.flops * assumptions.utilization,
            )
            for name in evaluated_models(self.recipe)
        ]


@cache
def _measure_activations(student: str, tiles_mlp: bool) -> dict[bool, list[tuple[int, int]]]:
    """With and without checkpointing: (length, bytes) at both measured lengths. Measuring takes a
    second, and the runs of a study have the same student.

    student: the section as JSON.
    """
    config = StudentConfig.model_validate_json(student)
    dtype = getattr(torch, resolve_dtype(config.dtype, torch.device("cuda")))
    model_config = _model_config(config)

    def measure(length: int, checkpointing: bool) -> int:
        return activation_bytes(
            model_config,
            [length],
            dtype=dtype,
            attention=config.attn_implementation,
            checkpointing=checkpointing,
            dropout=config.dropout,
            lora=config.lora,
            mlp_tile_tokens=MEASURED_TILE if tiles_mlp else None,
        )

    return {
        checkpointing: [(length, measure(length, checkpointing)) for length in MEASURED_LENGTHS]
        for checkpointing in (False, True)
    }


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


def device_by_name(name: str) -> Device:
    """A GPU by its name. Raises RecipeError for an unknown one."""
    if name not in GPUS:
        raise RecipeError(f"--gpu {name}: choose one of {', '.join(GPUS)}")
    return GPUS[name]
