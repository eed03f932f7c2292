"""What `compat/vllm_private.py` assumes of vLLM. A failure here means that upstream has changed:
adapt that file. Each engine runs in a separate process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pocl_ds.compat import vllm_private

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]

# Opens and closes two engines one after the other, and prints the state of the process.
TWO_ENGINES = """
import gc, inspect, json, os, sys, torch
os.environ.pop("OMP_NUM_THREADS", None)
from pocl_ds.compat import vllm_private
from pocl_ds.generation.vllm_engine import ENVIRONMENT
os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE="1")
set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
states = []
for _ in range(2):
    process_state = vllm_private.ProcessState(1)
    from vllm import LLM
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2,
              enforce_eager=True, dtype="float32")
    open_state = {
        "groups": torch.distributed.is_initialized(),
        "replaced": torch.set_num_threads is not set_num_threads,
        "step": hasattr(llm.llm_engine, "step"),
    }
    vllm_private.shut_down(llm)
    del llm
    vllm_private.destroy_process_groups()
    process_state.restore()
    closed_state = {
        "groups": torch.distributed.is_initialized(),
        "replaced": torch.set_num_threads is not set_num_threads,
        "threads": torch.get_num_threads() == threads,
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "dynamo": torch._dynamo.config.disable,
    }
    states.append([open_state, closed_state])
print(json.dumps(states))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU engine")
def test_closing_an_engine_restores_the_process(tiny_llama: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TWO_ENGINES, str(tiny_llama)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    states = json.loads(result.stdout.splitlines()[-1])
    for open_state, closed_state in states:
        # If `replaced` is false, vLLM no longer touches the function: ProcessState can shrink.
        assert open_state == {"groups": True, "replaced": True, "step": True}
        assert closed_state == {
            "groups": False,
            "replaced": False,
            "threads": True,
            "omp": None,
            "dynamo": False,
        }


def test_no_engine_can_sleep_on_a_cpu() -> None:
    if not torch.cuda.is_available():
        assert vllm_private.supports_sleep() is False


def test_llm_has_no_public_shutdown() -> None:
    """If it has, `shut_down` and `destroy_process_groups` can use it."""
    code = "from vllm import LLM; assert not hasattr(LLM, 'shutdown'); assert LLM.enqueue"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
