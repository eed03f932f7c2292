"""A SLURM cluster of three nodes on this machine. Skipped, with the reason, where it cannot be
started.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from slurm_cluster import SCRIPT, Cluster


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    if os.geteuid() != 0:
        return "starting a SLURM cluster needs root"
    if subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "true"], capture_output=True
    ).returncode:
        return "this machine gives no namespaces to its root"
    done = subprocess.run(
        ["bash", str(SCRIPT), "install"], capture_output=True, text=True, timeout=600
    )
    return (
        f"SLURM is not installed and could not be: {done.stderr.strip()[-200:]}"
        if done.returncode
        else ""
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    found = Cluster()
    found.script("down")
    found.script("up")
    yield found
    found.script("down")
