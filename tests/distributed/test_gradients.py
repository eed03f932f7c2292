"""ZeRO-3 ranks compute the gradients of one plain process over the global batch, for any number of
ranks and micro-batches.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, environment

# A covering set: every pair of values of (micro-batch, layout, rows of a chunk, tied,
# checkpointing) occurs in a case.
SHAPES: list[dict[str, Any]] = [
    {
        "micro": 1,
        "packed": False,
        "rows": 1,
        "model": "tied",
        "checkpointing": False,
        "loss": "fkl",
    },
    {
        "micro": 2,
        "packed": True,
        "rows": 7,
        "model": "untied",
        "checkpointing": True,
        "loss": "srkl",
    },
    {
        "micro": 4,
        "packed": False,
        "rows": 500,
        "model": "untied",
        "checkpointing": False,
        "loss": "jsd",
    },
    {
        "micro": 1,
        "packed": True,
        "rows": 500,
        "model": "gpt2",
        "checkpointing": True,
        "loss": "rkl",
    },
    {"micro": 4, "packed": True, "rows": 1, "model": "tied", "checkpointing": True, "loss": "tvd"},
    {"micro": 2, "packed": False, "rows": 7, "model": "opt", "checkpointing": False, "loss": "skl"},
    {
        "micro": 1,
        "tokens": 48,
        "packed": True,
        "rows": 7,
        "model": "opt",
        "checkpointing": False,
        "loss": "akl",
    },
    {
        "micro": 1,
        "tokens": 90,
        "packed": False,
        "rows": 7,
        "model": "tied",
        "checkpointing": True,
        "loss": "ab",
    },
    {
        "micro": 2,
        "packed": True,
        "rows": 7,
        "model": "tied",
        "checkpointing": False,
        "loss": "fkl",
        "ensemble": ["gpt2"],
    },
    {
        "micro": 1,
        "packed": True,
        "rows": 7,
        "model": "tied",
        "checkpointing": False,
        "loss": "rkl",
        "token_rule": {"name": "adakd", "options": {"threshold": 0.2, "center": 0.3}},
    },
    {
        "micro": 2,
        "packed": True,
        "rows": 7,
        "model": "untied",
        "checkpointing": False,
        "loss": "srkl",
        "thought_weight": 0.25,
    },
    # Two teachers by domain, with empty micro-batches on some ranks.
    {
        "micro": 2,
        "packed": True,
        "rows": 7,
        "model": "tied",
        "checkpointing": False,
        "loss": "fkl",
        "by_domain": ["gpt2"],
    },
    {
        "micro": 1,
        "tokens": 48,
        "packed": False,
        "rows": 7,
        "model": "untied",
        "checkpointing": True,
        "loss": "srkl",
        "by_domain": ["opt"],
    },
    # Compiled layers, padded and packed, with and without checkpointing.
    {
        "micro": 1,
        "packed": False,
        "rows": 7,
        "model": "tied",
        "checkpointing": False,
        "loss": "fkl",
        "compile": "layers",
    },
    {
        "micro": 2,
        "packed": True,
        "rows": 7,
        "model": "untied",
        "checkpointing": True,
        "loss": "fkl",
        "compile": "layers",
    },
]


@pytest.mark.parametrize("ranks", [*(pytest.param(n, marks=pytest.mark.weekly) for n in (1, 2)), 3])
def test_gradients(
    ranks: int,
    tmp_path: Path,
    tiny_llama: Path,
    tiny_llama_untied: Path,
    tiny_gpt2: Path,
    tiny_opt: Path,
) -> None:
    # With layer dropping on, ranks that skip different layers would wait for each other.
    opt = shutil.copytree(tiny_opt, tmp_path / "opt")
    config = json.loads((opt / "config.json").read_text())
    (opt / "config.json").write_text(json.dumps({**config, "layerdrop": 0.5}))
    models = {"tied": tiny_llama, "untied": tiny_llama_untied, "gpt2": tiny_gpt2, "opt": opt}
    teachers = {"tied": tiny_llama_untied, "untied": tiny_llama, "gpt2": tiny_opt, "opt": tiny_gpt2}
    shapes = [
        dict(shape)
        for shape in SHAPES
        if (12 % (ranks * shape["micro"]) == 0 or "tokens" in shape)
        and ("compile" not in shape or ranks == 2)  # each rank compiles for 15 s
    ]
    for shape in shapes:
        for field in ("ensemble", "by_domain"):
            shape[field] = [str(models[name]) for name in shape.get(field, [])]
    cases = [
        {**shape, "student": str(models[shape["model"]]), "teacher": str(teachers[shape["model"]])}
        for shape in shapes
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [
        "bash",
        str(ROOT / "launch" / "train.sh"),
        "--ranks",
        str(ranks),
        "--threads",
        "1",
        "--module",
        "gradient_worker",
        str(tmp_path / "cases.json"),
        str(tmp_path / "out.json"),
    ]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.run(
        command,
        text=True,
        capture_output=True,
        timeout=350,
        env={
            **environment(),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(tmp_path / "logs"),
            "PYTHONPATH": paths,
        },
    )
    assert process.returncode == 0, process.stderr[-3000:]
    errors = json.loads((tmp_path / "out.json").read_text())
    assert len(errors) == len(cases) > 5
    worst = max(zip(errors, range(len(errors)), strict=True))
    assert worst[0] < 2e-6, (worst, cases[worst[1]])
