"""With teachers by stage, ZeRO-3 ranks hold the teacher of the current stage alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from command_line import ROOT, environment


def test_the_former_teacher_is_freed(
    tmp_path: Path, tiny_llama: Path, tiny_gpt2: Path, tiny_llama_untied: Path
) -> None:
    out = tmp_path / "out.json"
    command = ["bash", str(ROOT / "launch" / "train.sh"), "--ranks", "2", "--threads", "1"]
    command += ["--module", "stage_teacher_worker"]
    command += [str(tiny_gpt2), str(tiny_llama_untied), str(tiny_llama), str(out)]
    process = subprocess.run(
        command,
        text=True,
        capture_output=True,
        timeout=300,
        env={
            **environment(),
            "POCL_PYTHON": sys.executable,
            "POCL_LOG_DIR": str(tmp_path / "logs"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        },
    )
    assert process.returncode == 0, process.stderr[-3000:]
    ranks = json.loads(out.read_text())
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["alive_before"] == rank["parts"] > 10
        assert rank["alive_after"] == 0
        assert rank["shared"]
        assert all(loss > 0 for loss in rank["losses"])
    assert ranks[0]["losses"] == ranks[1]["losses"]
