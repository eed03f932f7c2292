"""Private names of vLLM that this package uses, seen in vLLM 0.31 and 0.32.

vLLM keeps process groups, thread settings and memory per process, and its `LLM` has no method that
gives them back. tests/unit/compat/test_vllm_private.py fails when one of these names changes.
`generation/vllm_engine.py` and `generation/vllm_backend.py` are the only callers.
"""

from __future__ import annotations

import gc
import importlib
import os
from typing import Any

import torch

from pocl_ds.compat.torch_private import set_compile_disabled

# Imported when an engine opens, in a third of its start.
CPU_ENGINE_MODULES = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.renderers.hf",
)


def import_engine_modules() -> None:
    """Import `vllm.LLM`, and on a CPU the worker. On a GPU the worker's modules may touch the
    device, so that only the process of the engine may import them.
    """
    import vllm
    from vllm.platforms import current_platform

    _ = vllm.LLM  # imported by its first use
    if current_platform.is_cpu():
        for name in CPU_ENGINE_MODULES:
            importlib.import_module(name)


def supports_sleep() -> bool:
    """Whether an engine on this machine can free its GPU memory and continue later.

    `LLM(enable_sleep_mode=True)` raises on a platform without it; only `current_platform` reports
    it in advance.
    """
    from vllm.platforms import current_platform

    return bool(
        current_platform.is_sleep_mode_available()
        and current_platform.is_cumem_allocator_available()
    )


def shut_down(llm: Any) -> None:
    """Stop an engine's core and its workers. `LLM` has no public method for it
    (https://github.com/vllm-project/vllm/issues/1908; `LLM.shutdown` was proposed in
    https://github.com/vllm-project/vllm/pull/36283).
    """
    llm.llm_engine.engine_core.shutdown()


def destroy_process_groups() -> None:
    """Destroy the process groups that an engine made in this process, and free its cached memory.

    Without this, no second engine can be opened. Drop every reference to the engine first.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


class ProcessState:
    """Settings of this process that vLLM's CPU engine changes, and their values before it.

    The CPU worker replaces `torch.set_num_threads` with a function that does nothing
    (https://github.com/vllm-project/vllm/pull/38535), and takes one thread where OMP_NUM_THREADS is
    not set. It also compiles one small kernel, which needs a C++ compiler: torch's compiler is
    turned off on a CPU.
    """

    def __init__(self, threads: int | None) -> None:
        """Prepare the process for an engine.

        threads: CPU threads of the engine; None keeps torch's number.
        """
        self.set_num_threads, self.num_threads = torch.set_num_threads, torch.get_num_threads()
        self.omp_num_threads = os.environ.get("OMP_NUM_THREADS")
        # Before the engine is opened: afterwards the function has no effect.
        if threads is not None:
            torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        self.compile_was_disabled: bool | None = None
        if not torch.cuda.is_available():
            self.compile_was_disabled = set_compile_disabled(True)

    def restore(self) -> None:
        """Restore the settings from before the engine."""
        torch.set_num_threads = self.set_num_threads
        torch.set_num_threads(self.num_threads)
        if self.compile_was_disabled is not None:
            set_compile_disabled(self.compile_was_disabled)
        if self.omp_num_threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = self.omp_num_threads
