"""Containers in which the ranks of a job run: the words of the srun command, and the import of an
image. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocl_ds.errors import ResourceError
from pocl_ds.workflow.locks import hold_lock

# Option of apptainer and singularity that gives a container the driver of the GPUs.
GPU_OPTION = {"nvidia": "--nv", "amd": "--rocm"}


def container_words(spec: Mapping[str, Any], run: Path) -> list[str]:
    """The words after the options of srun that start a rank in the job's container; none without
    one. The container sees the run directory and the folder where the recipe's relative paths
    start.
    """
    container = spec["container"]
    if not container:
        return []
    cwd = os.getcwd()
    mounts = [f"{path}:{path}" for path in dict.fromkeys([str(run), cwd])]
    mounts += container["mounts"]
    if container["runtime"] == "pyxis":
        return [
            f"--container-image={container['image']}",
            # All commands of a job on a node use the container that the first one has unpacked.
            f"--container-name=pocl-{os.environ['SLURM_JOB_ID']}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={cwd}",
        ]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = [GPU_OPTION[spec["gpu_vendor"]]] if spec["gpus_per_node"] else []
    return [container["runtime"], "exec", *gpus, *binds, "--pwd", cwd, container["image"]]


def import_image(container: Mapping[str, Any], folder: Path) -> str:
    """The image as a file, which is imported once for all jobs and ranks of a run if it has an
    address such as docker://. pyxis imports images itself.

    folder: of the imported images. Raises ResourceError if the import fails.
    """
    image = str(container["image"])
    if container["runtime"] == "pyxis" or "://" not in image:
        return image
    file = folder / f"{hashlib.sha256(image.encode()).hexdigest()[:16]}.sif"
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / ".lock", fcntl.LOCK_EX):
        if not file.is_file():
            partial = file.with_suffix(".partial")
            command = [container["runtime"], "pull", "--force", str(partial), image]
            try:
                process = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise ResourceError(
                    f"{container['runtime']} cannot be started ({error.strerror}): load its module "
                    "in the profile's setup"
                ) from None
            if process.returncode:
                message = (process.stderr.strip() or "no message").splitlines()[-1]
                raise ResourceError(
                    f"{container['runtime']} cannot import {image} ({message}): import it on a "
                    "node with a network, and name the file in container.image"
                )
            os.replace(partial, file)
    return str(file)
