"""Cluster profiles: the options that jobs need on one SLURM cluster. A profile has no
hyper-parameters.

A profile is a YAML file: a path, a name in `slurm/profiles/`, or a name in
`~/.config/pocl/profiles/`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pocl_ds.config import NonNegative, Positive, Section
from pocl_ds.config.recipe_file import validation_message
from pocl_ds.config.yaml_io import dump_yaml, read_yaml
from pocl_ds.errors import RecipeError
from pocl_ds.resources import PROFILES
from pocl_ds.runtime.credentials import assigns_secret, find_secret, is_secret_name
from pocl_ds.workflow.steps import JOB_NAMES

PLAIN = re.compile(r"[A-Za-z0-9_.,:@/+=&|*()\[\]%-]+")


def _plain(value: str) -> str:
    if not PLAIN.fullmatch(value):
        raise ValueError("use only letters, digits and _ . , : @ / + = & | * ( ) [ ] % -")
    return value


def _scratch(value: str) -> str:
    if not re.fullmatch(r"(/([A-Za-z0-9_.,:@+=-]|\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})+)+/?", value):
        raise ValueError(
            "write an absolute path of letters, digits, _ . , : @ + = - and variables, as in "
            "/local/$SLURM_JOB_ID"
        )
    return value


def _time(value: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", value):
        raise ValueError(
            "write a time limit as SLURM does: minutes, HH:MM:SS, or D-HH:MM:SS; in quotes"
        )
    return value


Plain = Annotated[str, AfterValidator(_plain)]
TimeLimit = Annotated[str, AfterValidator(_time)]
if TYPE_CHECKING:
    JobName = str
else:
    JobName = Literal[JOB_NAMES]


class ContainerConfig(Section):
    """A container in which the ranks of a command run; the job's script runs outside."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        description="Container runtime: pyxis (enroot, by options of srun) or apptainer."
    )
    image: str = Field(description="Image: a file, or a name that the runtime understands.")
    mounts: tuple[str, ...] = Field(
        (), description="Mounts, SOURCE:TARGET each. The run directory is always mounted."
    )
    python: str = Field(
        "python3", description="Python interpreter in the image that has the packages of pocl_ds."
    )


class JobLimits(Section):
    """Limits of one job in place of the profile's."""

    partition: Plain | None = None
    time: TimeLimit | None = None
    memory: Plain | None = None


class Profile(Section):
    """One cluster, or one way of using it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    partition: Plain | None = None
    account: Plain | None = None
    qos: Plain | None = None
    constraint: Plain | None = None
    reservation: Plain | None = None
    exclude: Plain | None = Field(None, description="Nodes that jobs never use.")
    time: TimeLimit = Field(
        "24:00:00",
        description="Time limit of one attempt. A job requeues itself at the limit and continues.",
    )
    memory: Plain | None = Field(
        None, description="Memory per node of jobs on whole nodes, such as 480G; 0 for all of it."
    )
    gpus_per_node: NonNegative = Field(0, description="GPUs of a node; 0 for a CPU cluster.")
    gpu_type: Plain | None = Field(None, description="GPU type, as in --gpus-per-node=TYPE:N.")
    gres: bool = Field(
        False, description="Request GPUs by --gres=gpu:N, for clusters without --gpus-per-node."
    )
    cpus_per_node: Positive = Field(1, description="Cores of a node that jobs may use.")
    ranks_per_node: Positive | None = Field(
        None, description="Ranks per node. Default: one per GPU, or one on a CPU node."
    )
    interface: Plain | None = Field(
        None, description="Network interface between nodes, for NCCL and gloo."
    )
    setup: tuple[str, ...] = Field(
        (), description="Shell lines that run first, such as module load ..."
    )
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(
        default_factory=dict
    )
    container: ContainerConfig | None = None
    scratch: Annotated[str, AfterValidator(_scratch)] | None = Field(
        None,
        description="Node-local folder for temporary files (TMPDIR), such as "
        "/local/$SLURM_JOB_ID; created if it is missing.",
    )
    options: tuple[Plain, ...] = Field(
        (), description="Further options of sbatch, such as --mail-type=END."
    )
    grace_seconds: Positive = Field(
        120,
        description="Signal jobs so many seconds before the time limit: a checkpoint must fit in.",
    )
    preflight_seconds: Positive = Field(
        120, description="Seconds for the ranks to connect; a node that fails is excluded."
    )
    attempts: Positive = Field(5, description="Attempts without progress before a job fails.")
    array_tasks: Positive | None = Field(
        None, description="Tasks of a job array that may run at once."
    )
    jobs: dict[JobName, JobLimits] = Field(
        default_factory=dict, description="Other limits for one job, by its name."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        for option in self.options:
            if not option.startswith("--"):
                raise ValueError(f"options holds {option!r}: write each as --name=value")
        if self.gpus_per_node and self.ranks_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} is more than "
                f"gpus_per_node={self.gpus_per_node}: "
                "each rank needs its own GPU"
            )
        if self.ranks > self.cpus_per_node:
            raise ValueError(
                f"{self.ranks} ranks a node are more than cpus_per_node={self.cpus_per_node}: each "
                f"rank needs a core"
            )
        return self

    @property
    def ranks(self) -> int:
        """Ranks per node."""
        return self.ranks_per_node or self.gpus_per_node or 1


def load_profile(source: str) -> Profile:
    """Read and check a profile. Raises RecipeError, one sentence."""
    path = _path(source)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise RecipeError(
            f"profile {path} has no fields: start from one in {PROFILES}, or from `pocl profile "
            f"detect`"
        )
    return check_profile({"name": path.stem, **tree}, str(path))


def check_profile(tree: dict[str, Any], where: str) -> Profile:
    """Validate a tree of plain values. Raises RecipeError naming the first field at fault."""
    if field := find_secret(tree) or _assigned_secret(tree):
        raise RecipeError(
            f"profile {where}: field {field} contains a password, a token or a key, and "
            "job scripts are plain text: remove it, and export the variable in the shell that "
            "submits; SLURM passes it on"
        )
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(validation_message(error, f"profile {where}: field", Profile)) from None


def _assigned_secret(tree: dict[str, Any]) -> str | None:
    """The field that assigns a variable whose name looks like a secret's."""
    environment = tree.get("environment")
    if isinstance(environment, dict) and any(
        is_secret_name(str(name)) and value for name, value in environment.items()
    ):
        return "environment"
    for field in ("setup", "options"):
        lines = tree.get(field)
        if isinstance(lines, (list, tuple)) and any(assigns_secret(str(line)) for line in lines):
            return field
    return None


def dump_profile(profile: Profile) -> str:
    """The profile as YAML, without default values."""
    return dump_yaml(profile.model_dump(mode="json", exclude_defaults=True))


def _path(source: str) -> Path:
    if os.path.isfile(source):
        return Path(source)
    user_folder = (
        Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "pocl" / "profiles"
    )
    for folder in (user_folder, PROFILES):
        if os.sep not in source and os.path.isfile(path := folder / f"{source}.yaml"):
            return path
    names = sorted(
        {
            path.stem
            for folder in (user_folder, PROFILES)
            if folder.is_dir()
            for path in folder.glob("*.yaml")
        }
    )
    raise RecipeError(
        f"profile {source!r} is neither a file nor a name ({', '.join(names)}): check it, or "
        f"write one with `pocl profile detect`"
    )
