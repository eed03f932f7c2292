"""Ranks fill a teacher cache together, each with its own engine or two with one engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT, environment
from teacher_cache_runs import (
    LENGTHS,
    open_train_cache,
    write_cache,
    write_data,
)

from pocl_ds.workflow.run_dir import RunDirectory

pytestmark = pytest.mark.vllm  # the package must be installed


def states(run: RunDirectory) -> torch.Tensor:
    cache = open_train_cache(run)
    assert cache.find_damage("train", torch.arange(len(LENGTHS)).numpy()) is None
    return cache.read("train", tuple(range(len(LENGTHS))))


@pytest.mark.parametrize(("size", "processes"), [(1, "1 1"), (2, "1 0")])
def test_two_ranks_write_the_cache_of_one(
    size: int, processes: str, tmp_path: Path, tiny_llama: Path
) -> None:
    run = write_data(tmp_path / "ranks")
    command = ["bash", str(ROOT / "launch" / "train.sh"), "--ranks", "2", "--threads", "1"]
    command += ["--module", "cache_worker", str(tiny_llama), str(run.path), str(size)]
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    completed = subprocess.run(
        command,
        text=True,
        capture_output=True,
        timeout=300,
        env={
            **environment(),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(tmp_path / "logs"),
            "PYTHONPATH": os.pathsep.join(paths),
        },
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert (run.path / "processes.txt").read_text() == processes
    expected = states(write_cache(tmp_path / "one", tiny_llama))
    torch.testing.assert_close(states(run), expected, rtol=1e-4, atol=1e-5)
