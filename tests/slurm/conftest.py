"""A SLURM cluster of three nodes on this machine. If it cannot start, its tests are skipped."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from slurm_cluster import SCRIPT, Cluster


def skip_reason() -> str:
    """Why no cluster can start here; empty if one can."""
    if os.geteuid() != 0:
        return "starting a SLURM cluster needs root"
    if subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "true"], capture_output=True
    ).returncode:
        return "root may not create namespaces on this machine"
    process = subprocess.run(
        ["bash", str(SCRIPT), "install"], capture_output=True, text=True, timeout=600
    )
    return (
        f"SLURM could not be installed: {process.stderr.strip()[-200:]}"
        if process.returncode
        else ""
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := skip_reason():
        pytest.skip(reason)
    slurm = Cluster()
    slurm.script("down")
    slurm.script("up")
    yield slurm
    slurm.script("down")
