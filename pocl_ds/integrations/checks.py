"""Settings of a transformers or TRL trainer that contradict a plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from pocl_ds.curriculum.plan import Plan
from pocl_ds.errors import ModelError, RecipeError
from pocl_ds.models.heads import output_head


def check_arguments(trainer: Any, plan: Plan) -> None:
    """Raise RecipeError for arguments that would change the plan's batches or steps, and for a
    dataset without the rows that the plan names.
    """
    args = trainer.args
    if args.gradient_accumulation_steps * args.train_batch_size * args.world_size != (
        plan.batch_size
    ):
        raise RecipeError(
            f"the plan's batch_size={plan.batch_size} is not per_device_train_batch_size="
            f"{args.per_device_train_batch_size} times gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} times {args.world_size} processes: change one"
        )
    if args.max_steps > 0 and args.max_steps != plan.total_steps:
        raise RecipeError(
            f"max_steps={args.max_steps} contradicts the plan's {plan.total_steps} optimizer "
            "steps: leave max_steps out"
        )
    for name in ("packing", "padding_free", "ignore_data_skip"):
        if getattr(args, name, False):
            raise RecipeError(f"{name}=True would change the plan's batches: leave it out")
    if trainer.accelerator.split_batches or trainer.accelerator.dispatch_batches:
        raise RecipeError(
            "split_batches and dispatch_batches of accelerate would change the plan's batches: "
            "leave them out"
        )
    rows: Any = trainer.train_dataset
    needed = max(int(np.max(stage.order)) for stage in plan.stages) + 1
    if rows is None or len(rows) < needed:
        raise RecipeError(
            f"the plan's order names dataset row {needed - 1}, and train_dataset has "
            f"{0 if rows is None else len(rows)} rows: build the plan from the scores of this "
            "dataset"
        )


def check_own_loss(plan: Plan, *, has_token_rule: bool) -> None:
    """Raise RecipeError for a plan that a trainer which generates its responses, and computes its
    own loss, cannot follow.
    """
    if any(stage.sft_ratio for stage in plan.stages):
        raise RecipeError(
            "this trainer trains on responses that the student generates, and SFT on them "
            "teaches nothing: build the plan with sft_ratio=(0, 0)"
        )
    if has_token_rule or any(stage.weights is not None for stage in plan.stages):
        raise RecipeError(
            "this trainer computes its own loss, which has no token rule and no sample weights: "
            "leave token_rule out, and give only sample weights of 0 and 1"
        )


def check_models(trainer: Any, student: Any, teacher: Any | None) -> None:
    """Raise ModelError for a model that the loss cannot split into backbone and head."""
    for model in (student, teacher):
        if model is not None:
            output_head(model)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ModelError(
            "the curriculum's loss needs complete weights on every rank, and this trainer "
            "shards them with DeepSpeed or FSDP: train with `pocl train`, which shards both "
            "models, or without sharding"
        )
