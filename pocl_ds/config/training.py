"""Section `train`: optimization, checkpoints and tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pocl_ds.config.base import (
    RUNTIME_ONLY,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seconds,
    Section,
)


class CheckpointConfig(Section):
    """When training saves checkpoints, and which it keeps."""

    every_n_steps: Positive = Field(
        100,
        description="Save a checkpoint every so many optimizer steps.",
        json_schema_extra=RUNTIME_ONLY,
    )
    keep_last: Positive = Field(
        2,
        description="Number of most recent checkpoints to keep.",
        json_schema_extra=RUNTIME_ONLY,
    )
    keep_every_n_steps: Positive | None = Field(
        None,
        description="Also keep every checkpoint whose optimizer step is a multiple of this.",
        json_schema_extra=RUNTIME_ONLY,
    )
    keep_best: bool = Field(
        False,
        description="Also save at the end of each stage, and keep the checkpoint with the lowest "
        "validation loss.",
        json_schema_extra=RUNTIME_ONLY,
    )
    async_save: bool = Field(
        False,
        description="Copy the state to host memory and write it while training continues. The "
        "copy takes 12 bytes per parameter, divided over the ranks.",
        json_schema_extra=RUNTIME_ONLY,
    )


class TrackingConfig(Section):
    """Where training metrics go, besides `metrics.jsonl`, which is always written."""

    tensorboard: bool = Field(
        True,
        description="Write TensorBoard event files to `train/tensorboard`.",
        json_schema_extra=RUNTIME_ONLY,
    )
    wandb: bool = Field(
        False,
        description="Log to Weights & Biases; needs the package wandb and WANDB_API_KEY.",
        json_schema_extra=RUNTIME_ONLY,
    )
    wandb_project: str = Field(
        "pocl_ds", description="Project in Weights & Biases.", json_schema_extra=RUNTIME_ONLY
    )


class TrainConfig(Section):
    """Engine, batches, optimizer, validation, checkpoints and tracking."""

    engine: Literal["deepspeed", "torch"] = Field(
        "deepspeed",
        description="Training engine: `deepspeed` (ZeRO), or `torch` (plain PyTorch in float32, "
        "the numerical reference).",
    )
    batch_size: Positive = Field(
        64, description="Global batch size: samples per optimizer step, over all ranks."
    )
    micro_batch_size: Positive = Field(
        8,
        description="Samples per forward pass on one rank, or on one group of "
        "`sequence_parallel_size` ranks. Gradients are accumulated over `batch_size / "
        "(micro_batch_size * ranks / sequence_parallel_size)` micro-batches.",
        json_schema_extra=RUNTIME_ONLY,
    )
    micro_batch_tokens: Positive | None = Field(
        None,
        description="Maximum number of tokens per forward pass on one rank, or on one group of "
        "`sequence_parallel_size` ranks; replaces `micro_batch_size`.",
        json_schema_extra=RUNTIME_ONLY,
    )
    sequence_parallel_size: Positive = Field(
        1,
        description="Number of ranks that share a micro-batch: each has an equal part of its "
        "tokens, and in attention of its heads (Ulysses). Divides the activations of long samples "
        "over the ranks. Must divide `launch.ranks` and the number of attention heads.",
        json_schema_extra=RUNTIME_ONLY,
    )
    length_window: Positive = Field(
        1,
        description="Number of neighboring batches that exchange samples so that each batch has "
        "samples of similar length; 1 keeps the random batches.",
    )
    layout: Literal["auto", "padded", "packed"] = Field(
        "auto",
        description="Layout of a micro-batch: `padded` to the longest sample, or `packed` into one "
        "row without padding. `auto` chooses the cheaper.",
        json_schema_extra=RUNTIME_ONLY,
    )
    compile: Literal["none", "layers"] = Field(
        "none",
        description="`layers` compiles each decoder layer of both models with torch.compile, "
        "which needs Triton on GPUs and a C++ compiler on CPUs. The first optimizer steps take "
        "longer.",
        json_schema_extra=RUNTIME_ONLY,
    )
    mlp_tile_tokens: Positive | None = Field(
        None,
        description="Run the MLP of each layer, in both models, over so many tokens at a time: "
        "less memory for long samples, and the backward pass computes each MLP again. `null` runs "
        "it over all tokens at once.",
        json_schema_extra=RUNTIME_ONLY,
    )
    lr: PositiveFloat = Field(1e-4, description="Peak learning rate of AdamW.")
    min_lr: NonNegativeFloat = Field(
        1e-7, description="Learning rate at the end of the cosine decay."
    )
    warmup_steps: NonNegative = Field(
        0, description="Optimizer steps over which the learning rate rises linearly to `lr`."
    )
    lr_restart: Literal["per_stage", "never"] = Field(
        "per_stage",
        description="`per_stage` restarts the optimizer and the cosine decay at every stage. "
        "`never` uses one optimizer and one cosine over the whole training.",
    )
    weight_decay: NonNegativeFloat = Field(
        0.01, description="Weight decay of AdamW; biases and normalization weights have none."
    )
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the first and second moment."
    )
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: PositiveFloat = Field(
        1.0, description="Maximum gradient norm; larger gradients are clipped to it."
    )
    max_non_finite_steps: NonNegative = Field(
        0,
        description="Number of optimizer steps with a non-finite loss or gradient that may be "
        "skipped before the run stops.",
    )
    validate_max_samples: NonNegative = Field(
        64,
        description="Number of validation samples, chosen by hash, for the validation loss after "
        "each stage; 0 turns validation off.",
    )
    validate_every_n_steps: Positive | None = Field(
        None,
        description="Also compute the validation loss every so many optimizer steps. Needed by "
        "`policy.name: distillm`, which also validates before the first step.",
    )
    hang_timeout_seconds: Seconds = Field(
        1800,
        description="If a rank makes no progress for so many seconds, it writes its stack traces "
        "to `train/logs/` and the run ends.",
        json_schema_extra=RUNTIME_ONLY,
    )
    profile_steps: tuple[Positive, Positive] | None = Field(
        None,
        description="First and last optimizer step, as in `[10, 12]`, of which rank 0 writes a "
        "trace of torch.profiler and its largest entries to `train/profile/`.",
        json_schema_extra=RUNTIME_ONLY,
    )
    local_copy: str | None = Field(
        None,
        description="Folder on the local disk of each node, to which training copies the models "
        "and the tokenized data before it reads them, once per node; the copies are removed at "
        "its end. Variables such as `$TMPDIR` are those of the node. `null` reads them where they "
        "are.",
        json_schema_extra=RUNTIME_ONLY,
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("profile_steps")
    @classmethod
    def _check_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(
                f"the first step {steps[0]} comes after the last step {steps[1]}: exchange them"
            )
        return steps
