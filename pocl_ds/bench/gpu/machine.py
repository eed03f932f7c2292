"""The machine that a benchmark runs on: card, driver, versions, date and commit.

The runner imports no torch, so that it holds no memory of the GPU: a separate process asks torch.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from importlib import metadata
from typing import Any, TypeAlias

from pocl_ds.resources import ROOT, module_command

Machine: TypeAlias = dict[str, Any]
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "vllm", "liger-kernel", "trl")
UNKNOWN = "unknown"


def describe_machine(*, dry_run: bool) -> Machine:
    """What the results depend on besides the code; `dry_run` is true without a GPU too."""
    probe = json.loads(_output(module_command("pocl_ds.bench.gpu.machine")) or "{}")
    card = None if dry_run else probe.get("card")
    return {
        "dry_run": card is None,
        "card": card or platform.processor() or platform.machine(),
        "driver": _driver() if card else None,
        "cuda": probe.get("cuda") if card else None,
        "python": platform.python_version(),
        "packages": _versions(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def describe_card() -> dict[str, str | None]:
    """The GPU that torch sees, None without one, and torch's CUDA version."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"card": card, "cuda": torch.version.cuda}


def is_same_setup(machine: Machine, other: Machine) -> bool:
    """Whether two results come from the same card, versions and commit."""
    return all(
        machine.get(key) == other.get(key) for key in ("dry_run", "card", "packages", "commit")
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query).partition("\n")[0] or UNKNOWN


def _commit() -> str:
    """The short name of the checked-out commit, marked if files differ from it."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain"])
    return f"{commit or UNKNOWN}{' with changes' if changes else ''}"


def _output(command: list[str]) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


if __name__ == "__main__":
    print(json.dumps(describe_card()))
