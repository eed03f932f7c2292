"""Checks of the section `train` with other sections: ranks, batches, memory, healing, validation.

Each check raises ValueError with one sentence that names the fields and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocl_ds.config import Recipe


def check_training(recipe: Recipe) -> None:
    """Raise ValueError if the section `train` contradicts other fields."""
    _check_sequence_parallel(recipe)
    _check_batches(recipe)
    _check_optimization(recipe)
    _check_activations(recipe)


def _check_sequence_parallel(recipe: Recipe) -> None:
    """What groups of ranks that share a micro-batch exclude."""
    size, ranks = recipe.train.sequence_parallel_size, recipe.launch.ranks
    if size == 1:
        return
    field = f"train.sequence_parallel_size={size}"
    if ranks % size:
        raise ValueError(
            f"{field} does not divide launch.ranks={ranks} into groups: change one of them"
        )
    if recipe.train.layout == "padded":
        raise ValueError(
            f"{field} divides packed rows, and train.layout=padded makes none: set "
            "train.layout=packed"
        )
    for name, model in (("student", recipe.student), ("teacher", recipe.teacher)):
        if model is not None and model.attn_implementation != "per_sample":
            raise ValueError(
                f"{field} divides packed rows, which {name}.attn_implementation="
                f"{model.attn_implementation} does not read: set it to per_sample"
            )
    problem = None
    if recipe.cross_tokenizer:
        problem = f"loss.name={recipe.loss.name} compares spans: choose a divergence such as fkl"
    elif recipe.needs_shared_vocabulary and recipe.teacher_template == "own":
        problem = "teacher.template=own gives the teacher other rows: set it to student"
    elif recipe.teacher_ranks:
        problem = (
            "teacher.placement=own_ranks runs the teacher on complete rows: set it to with_student"
        )
    if problem:
        raise ValueError(f"{field} gives each rank a part of a row, and {problem}")


def _check_batches(recipe: Recipe) -> None:
    """Numbers of samples, tokens and ranks."""
    train, groups = recipe.train, recipe.launch.ranks // recipe.train.sequence_parallel_size
    samples_per_forward = train.micro_batch_size * groups
    tokens, longest = train.micro_batch_tokens, recipe.prompt.max_length
    if tokens is not None and tokens < longest:
        raise ValueError(
            f"train.micro_batch_tokens={tokens} is less than one sample of "
            f"prompt.max_length={longest}: raise it, or lower prompt.max_length"
        )
    if tokens is None and train.batch_size % samples_per_forward:
        counted = f"launch.ranks={recipe.launch.ranks}"
        if train.sequence_parallel_size > 1:
            counted += f" / train.sequence_parallel_size={train.sequence_parallel_size}"
        raise ValueError(
            f"train.batch_size={train.batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size} x {counted} = "
            f"{samples_per_forward}: change one of them"
        )
    subsets, samples = recipe.curriculum.num_subsets, recipe.data.max_train_samples
    if samples is not None and subsets > samples:
        raise ValueError(
            f"curriculum.num_subsets={subsets} is more than data.max_train_samples={samples}: "
            "use fewer subsets"
        )


def _check_optimization(recipe: Recipe) -> None:
    """Optimizer, healing and validation."""
    train, heal_steps = recipe.train, recipe.student.heal_steps
    if 0 < heal_steps <= train.warmup_steps:
        raise ValueError(
            f"train.warmup_steps={train.warmup_steps} is not less than the {heal_steps} steps of "
            "student.heal_steps, so healing would end during the warm-up: lower it, or heal longer"
        )
    if train.checkpoint.keep_best and not train.validate_max_samples:
        raise ValueError(
            "train.checkpoint.keep_best needs the validation loss: set train.validate_max_samples"
        )
    if train.engine == "torch" and recipe.student.dtype not in ("auto", "float32"):
        raise ValueError(
            "train.engine=torch has no float32 master weights, so small updates are lost in "
            f"{recipe.student.dtype}: set student.dtype=float32, or train.engine=deepspeed"
        )
    if train.min_lr > train.lr:
        raise ValueError(
            f"train.min_lr={train.min_lr:g} is greater than train.lr={train.lr:g}: the learning "
            "rate decays from lr to min_lr, so lower min_lr"
        )


def _check_activations(recipe: Recipe) -> None:
    """Settings that save the memory of activations."""
    train = recipe.train
    if train.compile == "layers" and train.mlp_tile_tokens is not None:
        raise ValueError(
            f"train.mlp_tile_tokens={train.mlp_tile_tokens} divides the layers that "
            "train.compile=layers compiles as one: set one of them to null or none"
        )
    if recipe.student.activation_offloading and not recipe.student.activation_checkpointing:
        raise ValueError(
            "student.activation_offloading moves what student.activation_checkpointing keeps: set "
            "student.activation_checkpointing=true"
        )
