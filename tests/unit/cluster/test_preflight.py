"""The preflight: which node is at fault, and with which exit code its ranks end."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.cluster import machine_checks, preflight
from pocl_ds.errors import EXIT_HANG, EXIT_UNFIT_NODE, ResourceError
from pocl_ds.workflow.run_dir import RunDirectory


def node_report(node: str, **fields: Any) -> dict[str, Any]:
    defaults = {
        "node": node,
        "faults": [],
        "node_fault": False,
        "notes": [],
        "clock": 100.0,
        "recipe": "r",
        "versions": {"torch": "2"},
    }
    return {**defaults, **fields}


def test_nodes_that_differ_are_named() -> None:
    assert preflight.differing_nodes([node_report("n1"), node_report("n2", clock=101.0)]) == {}
    reports = [
        node_report("n2", versions={"torch": "3"}),
        node_report("n3", recipe="other"),
        node_report("n4", clock=900.0),
    ]
    differing = preflight.differing_nodes([node_report("n1"), *reports])
    assert (
        "torch 3 against 2" in differing["n2"]
        and "another recipe" in differing["n3"]
        and "+800 s" in differing["n4"]
    )


def test_a_preflight_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.recipe.write_text("x")
    spec = {
        "name": "train",
        "gpus_per_node": 0,
        "gpu_vendor": "nvidia",
        "keep_last": 2,
        "lora": False,
    }
    assert preflight.preflight(run, spec) == (0, "")
    assert list((run.cluster / "preflight").iterdir()) == []
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr(preflight, "check_device", lambda gpus: None)
    code, sentence = preflight.preflight(run, {**spec, "gpus_per_node": 4096})
    assert code == EXIT_UNFIT_NODE and "4096 promised GPUs" in sentence, "another node may be fit"
    monkeypatch.setenv("POCL_GPUS", "2")  # set by launch/train.sh for ranks that see fewer
    assert "0 of 2 promised GPUs" in preflight.preflight(run, {**spec, "gpus_per_node": 4096})[1]
    monkeypatch.delenv("POCL_GPUS")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    code, sentence = preflight.preflight(run, spec)
    assert code == 2 and "TMPDIR" in sentence, "the fault is on every node, so no node is excluded"


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_cpu_build_of_torch_excludes_no_node(
    ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set-up on a login node without a GPU installs the CPU build on every node."""
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    code, sentence = preflight.preflight(
        RunDirectory(tmp_path), {"gpus_per_node": 8, "gpu_vendor": "nvidia"}
    )
    assert code == 2 and sentence.endswith("the CPU build: POCL_STACK=cuda bash launch/setup.sh")


@pytest.mark.parametrize(
    ("gpu_vendor", "hip", "message"),
    [
        ("amd", None, "gpu_vendor: amd, and torch .* is built for CUDA: .* with a torch for ROCm"),
        ("nvidia", "7.0", "gpu_vendor: nvidia, and torch .* is built for ROCm: correct"),
    ],
)
def test_a_torch_for_the_other_vendor_is_told(
    gpu_vendor: str, hip: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.version.hip", hip)
    spec = {"gpus_per_node": 8, "gpu_vendor": gpu_vendor}
    code, sentence = preflight.preflight(RunDirectory(tmp_path), spec)
    assert code == 2 and re.search(message, sentence)


def test_a_node_without_the_interface_fails_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the nodes that wait for it would look faulty."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    preflight.check_interfaces()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(ResourceError, match="no network interface ib7 with an address"):
        preflight.check_interfaces()


def exit_record(run: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The exit record of a preflight's process."""
    for folder in ("cluster/jobs", "records"):
        (run / folder).mkdir(parents=True)
    (run / "cluster" / "jobs" / "train.json").write_text(
        json.dumps({"name": "train", "keep_last": 2, "lora": False, **spec})
    )
    monkeypatch.setenv("POCL_EXITS", str(run / "records"))
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr("sys.argv", ["preflight", "train", "--run-dir", str(run)])
    monkeypatch.setattr(preflight, "install_signal_handlers", lambda: None)
    monkeypatch.setattr(preflight, "setup_logging", lambda *_, **__: None)
    code = preflight.main()
    record: dict[str, Any] = json.loads(next((run / "records").iterdir()).read_text())
    assert record["code"] == code
    return record


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize(
    ("visible", "error"),
    [
        (
            True,
            "its GPU 0 cannot compute (CUDA error: uncorrectable ECC error encountered): exclude "
            "this node",
        ),
        (False, "no GPU is visible, and 8 are promised (the driver is too old)"),
    ],
)
def test_a_gpu_that_cannot_compute_makes_its_node_unfit(
    visible: bool, error: str, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault must not look like ranks that do not reach each other."""

    def fail(message: str) -> None:
        raise RuntimeError(f"{message}\nCUDA kernel errors might be reported later")

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
    record = exit_record(
        tmp_path, {"gpus_per_node": 8, "gpu_vendor": "nvidia", "preflight_seconds": 5}, monkeypatch
    )
    assert (record["code"], record["error"]) == (EXIT_UNFIT_NODE, f"preflight: n1: {error}")
    if visible:
        assert machine_checks.check_gpus(None).message.startswith(
            "GPU 0 does not answer (CUDA error: uncorrectable ECC error encountered)"
        )


def test_ranks_that_do_not_connect_in_time_exit_with_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocking wait a timeout raises; without it the watchdog of c10d aborts the process."""

    def stall(backend: str, timeout: Any) -> None:
        assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"
        time.sleep(timeout.total_seconds())
        raise RuntimeError("timed out in blocking wait")

    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "")  # so that monkeypatch restores it
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", stall)
    record = exit_record(tmp_path, {"gpus_per_node": 0, "preflight_seconds": 0.2}, monkeypatch)
    assert (
        record["code"] == EXIT_HANG
        and "the ranks do not reach each other (timed out in blocking wait)" in record["error"]
    )


def test_ranks_of_fit_nodes_exit_with_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun kills all ranks once one fails: the unfit node's would die before they record why."""
    RunDirectory(tmp_path).recipe.write_text("x")
    other = node_report("n2", faults=["7 of 8 promised GPUs are visible"])
    monkeypatch.setattr(
        "pocl_ds.runtime.distributed.gather_objects", lambda report: [report, other]
    )
    spec = {"name": "report", "gpus_per_node": 0, "keep_last": 2, "lora": False}
    assert preflight.preflight(RunDirectory(tmp_path), spec) == (0, "")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")  # SLURM's name of the node, not the host's
    monkeypatch.setattr(
        "pocl_ds.runtime.distributed.gather_objects",
        lambda _report: [{**other, "node": "n1", "faults": []}, other],
    )
    assert preflight.preflight(RunDirectory(tmp_path), spec) == (
        EXIT_UNFIT_NODE,
        "n2: 7 of 8 promised GPUs are visible",
    )
