"""A cluster profile: what a job must say to one SLURM cluster. No hyper-parameter stands here.

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
from pocl_ds.config.recipe_file import first_fault
from pocl_ds.config.yaml_io import dump_yaml, read_yaml
from pocl_ds.errors import RecipeError
from pocl_ds.resources import PROFILES
from pocl_ds.runtime.credentials import assigns_secret, find_secret, is_secret_name
from pocl_ds.workflow.steps import JOB_NAMES

PLAIN = re.compile(r"[A-Za-z0-9_.,:@/+=&|*()\[\]%-]+")


def _plain(value: str) -> str:
    if not PLAIN.fullmatch(value):
        raise ValueError(
            "only letters, digits and _ . , : @ / + = & | * ( ) [ ] % - may stand here"
        )
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
    """An image that the tasks of a step run in; the job's own script runs outside."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        description="pyxis (enroot, by srun's own options) or apptainer"
    )
    image: str = Field(description="a file, or a name that the runtime understands")
    mounts: tuple[str, ...] = Field(
        (), description="SOURCE:TARGET each; the run directory is always mounted"
    )
    python: str = Field(
        "python3", description="the interpreter in the image that has pocl_ds's packages"
    )


class JobLimits(Section):
    """What one kind of job asks for instead of the profile's own."""

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
    exclude: Plain | None = Field(None, description="nodes never to use")
    time: TimeLimit = Field(
        "24:00:00", description="limit of one attempt; a job goes on after it by requeueing itself"
    )
    memory: Plain | None = Field(
        None, description="of a node for jobs on whole nodes, as in 480G; 0 for all of it"
    )
    gpus_per_node: NonNegative = Field(0, description="0 for a CPU cluster")
    gpu_type: Plain | None = Field(None, description="as in --gpus-per-node=TYPE:N")
    gres: bool = Field(
        False, description="ask by --gres=gpu:N, where --gpus-per-node is not configured"
    )
    cpus_per_node: Positive = Field(1, description="cores of a node that jobs may use")
    ranks_per_node: Positive | None = Field(
        None, description="default: one a GPU; one on a CPU node"
    )
    interface: Plain | None = Field(
        None, description="network interface between nodes, for NCCL and gloo"
    )
    setup: tuple[str, ...] = Field(
        (), description="lines of shell before anything runs: module load ..."
    )
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(
        default_factory=dict
    )
    container: ContainerConfig | None = None
    scratch: Annotated[str, AfterValidator(_scratch)] | None = Field(
        None,
        description="node-local folder for temporary files (TMPDIR), as in /local/$SLURM_JOB_ID; "
        "made if it is not there",
    )
    options: tuple[Plain, ...] = Field(
        (), description="further options of sbatch, as in --mail-type=END"
    )
    grace_seconds: Positive = Field(
        120, description="signal so long before the time limit: a checkpoint must fit in"
    )
    preflight_seconds: Positive = Field(
        120, description="a node whose ranks do not come together in this time is left out"
    )
    attempts: Positive = Field(5, description="attempts without progress before a job gives up")
    array_tasks: Positive | None = Field(None, description="tasks of an array that may run at once")
    jobs: dict[JobName, JobLimits] = Field(
        default_factory=dict, description="other limits for one kind of job"
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
                "a rank needs a GPU of its own"
            )
        if self.ranks > self.cpus_per_node:
            raise ValueError(
                f"{self.ranks} ranks a node are more than cpus_per_node={self.cpus_per_node}: a "
                f"rank needs a core"
            )
        return self

    @property
    def ranks(self) -> int:
        """Ranks a node."""
        return self.ranks_per_node or self.gpus_per_node or 1


def load_profile(source: str) -> Profile:
    """Read and check a profile. Raises RecipeError, one sentence."""
    path = _path(source)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise RecipeError(
            f"profile {path} holds no fields: start from one in {PROFILES}, or from `pocl profile "
            f"detect`"
        )
    return check_profile({"name": path.stem, **tree}, str(path))


def check_profile(tree: dict[str, Any], where: str) -> Profile:
    """Validate a tree of plain values. Raises RecipeError naming the first field at fault."""
    if field := find_secret(tree) or _assigned_secret(tree):
        raise RecipeError(
            f"profile {where}: field {field} holds a password, a token or a key, and scripts are "
            f"written down: "
            "remove it, and export it in the shell that submits, whose variables SLURM hands on"
        )
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(first_fault(error, f"profile {where}: field", Profile)) from None


def _assigned_secret(tree: dict[str, Any]) -> str | None:
    """The field that gives a variable with the name of a secret its value."""
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
    """The profile as YAML, without what was left at its default."""
    return dump_yaml(profile.model_dump(mode="json", exclude_defaults=True))


def _path(source: str) -> Path:
    if os.path.isfile(source):
        return Path(source)
    own = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "pocl" / "profiles"
    for folder in (own, PROFILES):
        if os.sep not in source and os.path.isfile(found := folder / f"{source}.yaml"):
            return found
    names = sorted(
        {
            path.stem
            for folder in (own, PROFILES)
            if folder.is_dir()
            for path in folder.glob("*.yaml")
        }
    )
    raise RecipeError(
        f"profile {source!r} is neither a file nor a name ({', '.join(names)}): check it, or "
        f"write one with `pocl profile detect`"
    )
