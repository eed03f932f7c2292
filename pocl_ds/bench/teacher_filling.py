"""Filling the teacher cache by vLLM and by transformers, in turn: seconds until all hidden states
of a split are in this process, without the disk.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.bench.step_worker import model_configs, write_split
from pocl_ds.bench.workloads import Workload
from pocl_ds.config import TeacherCacheConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.models.recipe_model import load_recipe_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers.state_sources import HiddenStateSource, SourceFactory

BACKENDS = ("transformers", "vllm")


def measure_filling(work: Workload, folder: Path, *, rounds: int, copies: int) -> dict[str, Any]:
    """Seconds of each round and backend, and the number of tokens. folder: with the models in
    student/ and teacher/. copies: how often the workload's samples are in the data, each time with
    other tokens. Both teachers are open all the time; the first round does not count.
    """
    write_split(work, folder / "filling", copies)
    split = TokenizedSplit.open(folder / "filling", "train")
    _, teacher = model_configs(folder, "cached")
    factory = SourceFactory(
        teacher.model_copy(update={"ds_config": None}),
        teacher.model,
        VocabMap(int(work.teacher["vocab_size"])),
        TeacherCacheConfig(max_batch_tokens=2048),
        int(split.total_tokens.max()),
        load_recipe_model,
    )
    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    with contextlib.ExitStack() as stack:
        sources = {
            "transformers": stack.enter_context(factory.open("transformers", split)),
            "vllm": stack.enter_context(factory.open("vllm", split)),
        }
        for _ in range(rounds + 1):
            for backend, source in sources.items():
                start = time.perf_counter()
                _read_states(source, split)
                seconds[backend].append(time.perf_counter() - start)
    return {
        "tokens": int(split.total_tokens.sum()),
        "seconds": {backend: values[1:] for backend, values in seconds.items()},
    }


def _read_states(source: HiddenStateSource, split: TokenizedSplit) -> None:
    lengths = np.asarray(split.total_tokens, np.int64)
    tokens = 0
    for batch in source.assign(lengths)[distributed.rank()]:
        tokens += sum(len(states.cpu()) for _, states in source.states(split, batch))
    assert tokens == int(split.loss_tokens.sum())
