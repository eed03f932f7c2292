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

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from pocl_ds.config import NonNegative, Positive, Section
from pocl_ds.config.base import FileName, VariableName, WholeSeconds, text_pattern
from pocl_ds.config.recipe_file import validation_message
from pocl_ds.config.yaml_io import dump_yaml, read_yaml
from pocl_ds.errors import RecipeError
from pocl_ds.resources import PROFILES
from pocl_ds.runtime.credentials import assigns_secret, find_secret, is_secret_name
from pocl_ds.workflow.steps import JOB_NAMES

# Variables that fields of the section `network` set.
NETWORK_FIELDS = {
    "NCCL_SOCKET_IFNAME": "interface",
    "GLOO_SOCKET_IFNAME": "interface",
    "NCCL_IB_HCA": "ib_hca",
}
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


def _mount(value: str) -> str:
    if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[a-z+,]+)?", value):
        raise ValueError("write SOURCE:TARGET with absolute paths, as in /data:/data")
    return value


def _time(value: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", value):
        raise ValueError(
            "write a time limit as SLURM does: minutes, HH:MM:SS, or D-HH:MM:SS; in quotes"
        )
    return value


def _adapters(value: str) -> str:
    if not re.fullmatch(r"[\^=]?[A-Za-z0-9_.-]+(:\d+)?(,[A-Za-z0-9_.-]+(:\d+)?)*", value):
        raise ValueError(
            "write names of adapters with commas between them, as in mlx5_0,mlx5_1:1 or ^mlx5_2"
        )
    return value


Plain = Annotated[str, AfterValidator(_plain)]
ResourceName = Annotated[
    str,
    text_pattern(
        r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        "use at most 63 small letters, digits and hyphens, with a letter or a digit at both ends",
    ),
]
MountPath = Annotated[
    str, text_pattern(r"^/[^:]*$", "write an absolute path without colons, as in /shared")
]
ImageName = Annotated[
    str, text_pattern(r"^\S+$", "write the name of an image, as in registry.example.com/pocl:1")
]
TimeLimit = Annotated[str, AfterValidator(_time)]
if TYPE_CHECKING:
    JobName = str
else:
    JobName = Literal[JOB_NAMES]


class ContainerConfig(Section):
    """A container in which the ranks of a command run; the job's script runs outside."""

    runtime: Literal["pyxis", "apptainer", "singularity"] = Field(
        description="Container runtime: pyxis (enroot, by options of srun), apptainer or "
        "singularity."
    )
    image: str = Field(
        description="Image: a file, or a name that the runtime understands, which is imported once."
    )
    mounts: tuple[Annotated[str, AfterValidator(_mount)], ...] = Field(
        (),
        description="Mounts, SOURCE:TARGET or SOURCE:TARGET:OPTIONS each. The run directory and "
        "the working directory of `pocl submit` are always mounted.",
    )
    python: str = Field(
        "python3", description="Python interpreter in the image that has the packages of pocl_ds."
    )


class KubernetesConfig(Section):
    """What `pocl submit --target kubernetes` needs besides the other fields."""

    image: ImageName = Field(description="Image with the packages and pocl_ds (slurm/Dockerfile).")
    python: str = Field(
        "python3", description="Python interpreter in the image that has the packages of pocl_ds."
    )
    claims: dict[ResourceName, MountPath] = Field(
        min_length=1,
        description="Persistent volume claims that all pods can write, and where they are mounted; "
        "the run directory is below one.",
    )
    namespace: ResourceName = Field("default", description="Namespace of the jobs and claims.")
    node_selector: dict[str, str] = Field(
        {}, description="Labels that nodes must have, for example those of a GPU type."
    )

    @field_validator("claims")
    @classmethod
    def _check_claims(cls, value: dict[str, str]) -> dict[str, str]:
        paths = [path.rstrip("/") for path in value.values()]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise ValueError(f"two claims are mounted at {twice}: give each its own path")
        return value


class NetworkConfig(Section):
    """The network between nodes, as variables that NCCL, RCCL and gloo read."""

    interface: Plain | None = Field(
        None,
        description="Network interface between nodes, such as ib0, for NCCL and gloo: "
        "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.",
    )
    ib_hca: Annotated[str, AfterValidator(_adapters)] | None = Field(
        None,
        description="InfiniBand or RoCE adapters that NCCL uses, such as mlx5_0,mlx5_1, or all "
        "but some, such as ^mlx5_2: NCCL_IB_HCA.",
    )
    extra: dict[VariableName, str] = Field(
        {},
        description="Further variables of the network, such as NCCL_IB_GID_INDEX or FI_PROVIDER; "
        "numbers in quotes.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> NetworkConfig:
        for variable, field in NETWORK_FIELDS.items():
            if variable in self.extra:
                raise ValueError(f"extra sets {variable}: write it as network.{field}")
        return self

    @property
    def variables(self) -> dict[str, str]:
        """The variables of every job by name."""
        values = {name: getattr(self, field) for name, field in NETWORK_FIELDS.items()}
        return {name: value for name, value in values.items() if value is not None} | self.extra


class JobOptions(Section):
    """Options of sbatch that every job has, or one job in place of the profile's."""

    partition: Plain | None = Field(None, description="Partition.")
    account: Plain | None = Field(None, description="Account that the job is charged to.")
    qos: Plain | None = Field(None, description="Quality of service.")
    constraint: Plain | None = Field(None, description="Features that nodes must have.")
    reservation: Plain | None = Field(None, description="Reservation to run in.")
    nodelist: Plain | None = Field(None, description="Nodes that the job must use.")
    exclude: Plain | None = Field(None, description="Nodes that the job never uses.")


class JobLimits(JobOptions):
    """Options of one job in place of the profile's."""

    time: TimeLimit | None = Field(None, description="Time limit of one attempt.")
    memory: Plain | None = Field(None, description="Memory per node, such as 100G.")
    cpus_per_task: Positive | None = Field(None, description="Cores of each task.")
    options: tuple[Plain, ...] = Field(
        (), description="Further options of sbatch, after those of the profile."
    )


class Profile(JobOptions):
    """One cluster, or one way of using it."""

    name: FileName = Field(description="Name of the profile. Default: that of its file.")
    time: TimeLimit = Field(
        "24:00:00",
        description="Time limit of one attempt. A job requeues itself at the limit and continues.",
    )
    memory: Plain | None = Field(
        None,
        description="Memory per node of jobs on whole nodes, such as 480G; 0 for all of it. Other "
        "jobs get the share of a size that their cores are of the node's.",
    )
    gpus_per_node: NonNegative = Field(0, description="GPUs of a node; 0 for a CPU cluster.")
    gpu_type: Plain | None = Field(None, description="GPU type, as in --gpus-per-node=TYPE:N.")
    gpu_vendor: Literal["nvidia", "amd"] = Field(
        "nvidia",
        description="Maker of the GPUs: `nvidia` for a torch built for CUDA, `amd` for one built "
        "for ROCm.",
    )
    gres: bool = Field(
        False, description="Request GPUs by --gres=gpu:N, for clusters without --gpus-per-node."
    )
    cpus_per_node: Positive = Field(1, description="Cores of a node that jobs may use.")
    ranks_per_node: Positive | None = Field(
        None, description="Ranks per node. Default: one per GPU, or one on a CPU node."
    )
    network: NetworkConfig = Field(
        NetworkConfig(), description="Network interface and adapters between nodes."
    )
    setup: tuple[str, ...] = Field(
        (), description="Shell lines that run first, such as module load ..."
    )
    environment: dict[VariableName, str] = Field(
        default_factory=dict, description="Variables of every job; numbers in quotes."
    )
    container: ContainerConfig | None = Field(
        None, description="Container in which the ranks run; `null` for none."
    )
    kubernetes: KubernetesConfig | None = Field(
        None, description="Image and volumes on Kubernetes; `null` for a SLURM cluster."
    )
    scratch: Annotated[str, AfterValidator(_scratch)] | None = Field(
        None,
        description="Node-local folder for temporary files (TMPDIR), such as "
        "/local/$SLURM_JOB_ID; created if it is missing.",
    )
    options: tuple[Plain, ...] = Field(
        (), description="Further options of sbatch, such as --comment=x."
    )
    mail: Plain | None = Field(
        None, description="Address that gets a mail when the run ends, or when a job of it fails."
    )
    begin: Plain | None = Field(
        None, description="When the first jobs may start, as `sbatch --begin` takes it."
    )
    dependency: Plain | None = Field(
        None,
        description="What the first jobs wait for, as `sbatch --dependency` takes it: "
        "afterok:JOBID.",
    )
    grace_seconds: WholeSeconds = Field(
        120,
        description="Signal jobs so many seconds before the time limit: a checkpoint must fit in.",
    )
    preflight_seconds: WholeSeconds = Field(
        120, description="Seconds for the ranks to connect; a node that fails is excluded."
    )
    attempts: Positive = Field(5, description="Attempts without progress before a job fails.")
    array_tasks: Positive | None = Field(
        None, description="Tasks of a job array that may run at once."
    )
    jobs: dict[JobName, JobLimits] = Field(
        default_factory=dict, description="Other options for one job, by its name."
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
        if twice := sorted(self.environment.keys() & self.network.variables.keys()):
            raise ValueError(f"environment and network both set {twice[0]}: leave it in one")
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
    network = tree.get("network")
    variables = {
        "environment": tree.get("environment"),
        "network.extra": network.get("extra") if isinstance(network, dict) else None,
    }
    for field, values in variables.items():
        if isinstance(values, dict) and any(
            is_secret_name(str(name)) and value for name, value in values.items()
        ):
            return field
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
