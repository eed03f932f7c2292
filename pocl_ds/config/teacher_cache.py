"""Section `teacher_cache`: what `pocl cache-teacher` stores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pocl_ds.config.base import (
    RUNTIME_ONLY,
    SHARDS_DESCRIPTION,
    Fraction,
    Positive,
    PositiveFloat,
    Section,
    Shards,
    TopP,
)


class TeacherCacheConfig(Section):
    """The cache of teacher outputs, for every `teacher.mode` except `online`."""

    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What runs the teacher: `transformers`, as in training, or `vllm`, whose "
        "hidden states are equal up to rounding.",
    )
    tensor_parallel_size: Positive = Field(
        1,
        description="With `backend: vllm`: number of ranks whose GPUs share one model. It divides "
        "the ranks of each node.",
        json_schema_extra=RUNTIME_ONLY,
    )
    gpu_memory_utilization: Fraction = Field(
        0.85,
        description="With `backend: vllm`: fraction of a GPU's memory that vLLM may use.",
        json_schema_extra=RUNTIME_ONLY,
    )
    top_k: Positive = Field(
        64,
        description="With `teacher.mode: cached_topk`: number of largest probabilities to store "
        "per token.",
    )
    top_p: TopP | None = Field(
        None,
        description="With `teacher.mode: cached_topk`: store only as many of the `top_k` ids as "
        "have this probability together at every temperature of the plan, which saves bytes where "
        "all temperatures are 1; `null` stores all `top_k`.",
    )
    num_samples: Positive = Field(
        50,
        description="With `teacher.mode: cached_sampled`: number of ids to draw from the teacher's "
        "distribution per token, with replacement. 50 gave the authors of arXiv 2503.16870 about "
        "12 different ids.",
    )
    hidden_dtype: Literal["model", "bfloat16", "int8"] = Field(
        "model",
        description="With `teacher.mode: cached_hidden_states` or `auto`: type of the stored "
        "numbers. `model` is the teacher's own, which is exact. `int8` takes a byte for each "
        "number, and 4 for each token (docs/method.md, eq. 33); the log has its error.",
    )
    max_disk_gb: PositiveFloat | None = Field(
        None,
        description="Maximum size of the cache in GB; `null` limits it only by the free disk "
        "space.",
        json_schema_extra=RUNTIME_ONLY,
    )
    local_copy: str | None = Field(
        None,
        description="Folder on the local disk of each node, to which training copies the cache "
        "before it reads it, once per node; variables such as `$TMPDIR` and `$SLURM_TMPDIR` are "
        "those of the node. `null` reads the run directory.",
        json_schema_extra=RUNTIME_ONLY,
    )
    shards: Shards = Field(1, description=SHARDS_DESCRIPTION, json_schema_extra=RUNTIME_ONLY)
    max_batch_tokens: Positive = Field(
        8192,
        description="Maximum number of tokens per forward pass on one rank.",
        json_schema_extra=RUNTIME_ONLY,
    )
