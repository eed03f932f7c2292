"""The srun command that starts the ranks of a job's command. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pocl_ds.cluster.containers import container_words
from pocl_ds.cluster.job_state import controller_output


def srun_command(
    spec: dict[str, Any], run: Path, nodes: int, tasks_per_node: int, logs: str
) -> list[str]:
    """The arguments of srun: tasks, their cores, a log for each rank, and the container."""
    command = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={spec['cpus_per_task']}",
        "--kill-on-bad-exit=1",
        "--wait=30",
        "--export=ALL",
        f"--output={logs}",
    ]
    if re.search(r"TaskPlugin\s*=\s*\S*(affinity|cgroup)", controller_output("config")):
        command.append("--cpu-bind=cores")
    return [*command, *container_words(spec, run)]
