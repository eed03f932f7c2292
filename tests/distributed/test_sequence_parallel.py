"""Ranks that share a packed row compute the hidden states and gradients of one rank that has it
all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import ROOT, environment

CASE: dict[str, Any] = {"micro": 2, "packed": True, "rows": 7, "checkpointing": False}
# Every sample is dealt to a group of ranks; the last micro-batches of some groups are empty.
CASES: list[dict[str, Any]] = [
    {**CASE, "loss": "fkl", "sequence_parallel": 2},
    {**CASE, "loss": "srkl", "sequence_parallel": 4, "checkpointing": True, "micro": 4},
    {**CASE, "loss": "rkl", "sequence_parallel": 4, "tokens": 48, "micro": 1, "rows": 500},
    {**CASE, "loss": "fkl", "sequence_parallel": 2, "by_domain": True, "micro": 1, "tokens": 60},
    {
        **CASE,
        "loss": "jsd",
        "sequence_parallel": 2,
        "token_rule": {"name": "adakd", "options": {"threshold": 0.2, "center": 0.3}},
    },
    {**CASE, "loss": "skl", "sequence_parallel": 2, "ensemble": True},
    # MLPs over tiles of tokens, of which ranks have different numbers, and saved tensors offloaded.
    {**CASE, "loss": "tvd", "tile": 5},
    {**CASE, "loss": "fkl", "tile": 16, "checkpointing": True, "offload": True, "packed": False},
    {
        **CASE,
        "loss": "fkl",
        "sequence_parallel": 2,
        "tile": 3,
        "checkpointing": True,
        "offload": True,
    },
]


def run_ranks(ranks: int, module: str, *arguments: str, logs: Path) -> None:
    command = ["bash", str(ROOT / "launch" / "train.sh"), "--ranks", str(ranks), "--threads", "1"]
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    process = subprocess.run(
        [*command, "--module", module, *arguments],
        text=True,
        capture_output=True,
        timeout=600,
        env={
            **environment(),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(logs),
            "PYTHONPATH": os.pathsep.join(paths),
        },
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.weekly)])
def test_every_family_computes_the_same_on_parts_of_a_row(ranks: int, tmp_path: Path) -> None:
    """Also with grouped keys that are fewer than the ranks, sliding windows, soft caps, experts,
    and frequencies that depend on the length of a sample.
    """
    out = tmp_path / "out.json"
    longrope = tiny_models.longrope(tmp_path / "longrope")
    dynamic = tiny_models.dynamic_ntk(tmp_path / "dynamic")
    arguments = (str(longrope), str(dynamic), str(out))
    run_ranks(ranks, "sequence_worker", *arguments, logs=tmp_path / "logs")
    families = json.loads(out.read_text())
    assert len(families) > 20
    for family in families:
        assert "2" in family["errors"], family
        # The norms of some families compute their gradients in float32.
        limit = 1e-6 if family["family"].startswith(("gemma", "cohere")) else 1e-12
        for hidden_error, gradient_error in family["errors"].values():
            assert hidden_error < 1e-12 and gradient_error < limit, family


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.weekly)])
def test_gradients(ranks: int, tmp_path: Path) -> None:
    """Of one step of the trainer, with ZeRO-3 over all ranks."""
    student = tiny_models.llama(tmp_path / "student", hidden=128)
    teacher = tiny_models.llama(tmp_path / "teacher", hidden=128, seed=1, tied=False)
    other = tiny_models.gpt2(tmp_path / "other", hidden=128, dropout=0.0)
    cases = [
        {
            **case,
            "student": str(student),
            "teacher": str(teacher),
            **{name: [str(other)] for name in ("by_domain", "ensemble") if name in case},
        }
        for case in CASES
        if ranks // case.get("sequence_parallel", 1) in (1, 2)  # divide the batch
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    arguments = (str(tmp_path / "cases.json"), str(tmp_path / "out.json"))
    run_ranks(ranks, "gradient_worker", *arguments, logs=tmp_path / "logs")
    errors = json.loads((tmp_path / "out.json").read_text())
    assert len(errors) == len(cases) > 3
    worst = max(zip(errors, range(len(errors)), strict=True))
    assert worst[0] < 2e-6, (worst, cases[worst[1]])
