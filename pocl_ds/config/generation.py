"""Sections `score.generation` and `evaluate.generation`: the engine that generates text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pocl_ds.config.base import DTYPE_AUTO, RUNTIME_ONLY, Dtype, Fraction, Positive, Section


class GenerationConfig(Section):
    """The engine that generates text."""

    backend: Literal["vllm", "transformers"] = Field(
        "vllm",
        description="Generation engine: `vllm`, or `transformers` as the slower numerical "
        "reference.",
    )
    max_num_seqs: Positive = Field(
        64,
        description="Maximum number of sequences that are generated at the same time.",
        json_schema_extra=RUNTIME_ONLY,
    )
    max_num_batched_tokens: Positive = Field(
        8192,
        description="Maximum number of tokens in one iteration of the engine.",
        json_schema_extra=RUNTIME_ONLY,
    )
    gpu_memory_utilization: Fraction = Field(
        0.85,
        description="Fraction of a GPU's memory that vLLM may use.",
        json_schema_extra=RUNTIME_ONLY,
    )
    tensor_parallel_size: Positive = Field(
        1,
        description="Number of GPUs over which vLLM shards one model.",
        json_schema_extra=RUNTIME_ONLY,
    )
    dtype: Dtype = Field("auto", description=f"Data type of weights and activations. {DTYPE_AUTO}")
