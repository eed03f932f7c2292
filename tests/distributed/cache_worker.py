"""Ranks of test_vllm_cache: fill a teacher cache from the processes next to them, which
tests/hidden_state_child.py stands in for.

    launch/train.sh --ranks R --module cache_worker MODEL FOLDER TENSOR_PARALLEL_SIZE
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hidden_state_child import start_child_instead
from teacher_cache_runs import write_cache

from pocl_ds.runtime import distributed


def main(model: Path, folder: Path, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        processes = start_child_instead(patch)
        write_cache(
            folder, model, backend="vllm", tensor_parallel_size=size, shards=2, max_batch_tokens=64
        )
    counts = distributed.gather_objects(len(processes))
    if distributed.rank() == 0:
        (folder / "processes.txt").write_text(" ".join(map(str, counts)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
