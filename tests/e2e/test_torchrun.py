"""Plain machines: torchrun starts the ranks, with a rendezvous, as on two machines."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from command_line import ROOT, environment
from tiny_runs import write_recipe

from pocl_ds.cli.main import main


def start_node(run: Path, port: int) -> subprocess.Popen[str]:
    """Start the torchrun of one node, as docs/cluster.md does."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"),
            *("-m", "pocl_ds.cli.main", "train", "--run-dir", str(run)),
        ],
        cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def on_two_nodes(run: Path) -> tuple[list[int], str]:
    """The exit codes of both, and what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [start_node(run, port) for _ in range(2)]
    output = "".join(node.communicate(timeout=300)[0] for node in nodes)
    return [node.returncode for node in nodes], output


@pytest.mark.weekly
def test_two_nodes_train_together(tmp_path: Path) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_models.llama(tmp_path / name, layers=1, seed=seed)
    recipe = write_recipe(
        tmp_path,
        tmp_path / "teacher",
        tmp_path / "student",
        max_train_samples=24,
        ranking={"strategy": "random"},
        curriculum={"num_subsets": 1, "epochs_per_stage": 1},
    )
    run = tmp_path / "run"
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(recipe), "--run-dir", str(run)]) == 0

    codes, output = on_two_nodes(run)
    assert codes == [0, 0], output[-3000:]
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    assert (manifest["info"]["ranks"], manifest["info"]["steps"]) == (2, 3)
    assert (run / "train" / "final" / "model.safetensors").is_file()
