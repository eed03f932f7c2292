"""The srun command that starts the ranks of a job's command. Standard library only."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

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
    container = spec["container"]
    if not container:
        return command

    # The container sees the run directory and the folder where the recipe's relative paths start.
    cwd = os.getcwd()
    mounts = [f"{path}:{path}" for path in dict.fromkeys([str(run), cwd])]
    mounts += container["mounts"]
    if container["runtime"] == "pyxis":
        return [
            *command,
            f"--container-image={container['image']}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={cwd}",
        ]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    nvidia = ["--nv"] if spec["gpus_per_node"] else []
    return [*command, "apptainer", "exec", *nvidia, *binds, "--pwd", cwd, container["image"]]
