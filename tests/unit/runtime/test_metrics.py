"""Metrics files and trackers."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path

import pytest

from pocl_ds.errors import ResourceError
from pocl_ds.runtime.metrics import MetricsWriter, read_metrics


def test_records_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    options = {"tensorboard": False, "wandb": False, "wandb_project": "", "name": "x"}
    writer = MetricsWriter(tmp_path, step=0, **options)  # type: ignore[arg-type]
    for step in range(1, 6):
        writer.write({"kind": "step", "step": step, "loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "st')  # a kill cut this line short
    writer = MetricsWriter(tmp_path, step=3, **options)  # type: ignore[arg-type]
    writer.write({"kind": "step", "step": 4, "loss": 9.0})
    writer.close()
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        1.0,
        0.5,
        1 / 3,
        9.0,
    ]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_full_disk_names_the_metrics_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(
        tmp_path, step=0, tensorboard=False, wandb=False, wandb_project="", name=""
    )
    with pytest.raises(
        ResourceError, match=f"the disk is full while writing {tmp_path / 'metrics.jsonl'}: free"
    ):
        try:
            writer.write({"kind": "step", "step": 1})
        finally:
            writer.close()


def test_tensorboard_reports_a_full_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next write raises the error of TensorBoard's thread, and no traceback is printed."""
    monkeypatch.setattr(threading, "excepthook", lambda fault: printed.append(fault.exc_value))
    printed: list[object] = []
    writer = MetricsWriter(
        tmp_path, step=0, tensorboard=True, wandb=False, wandb_project="", name=""
    )
    (file,) = (tmp_path / "tensorboard").iterdir()
    (tmp_path / "full").symlink_to("/dev/full")
    os.replace(tmp_path / "full", file)  # atomic: the thread may be writing
    with pytest.raises(
        ResourceError, match=f"the disk is full while writing {tmp_path / 'tensorboard'}: free"
    ):
        for step in range(200):
            writer.write({"kind": "step", "step": step, "loss": 1.0})
            with suppress(OSError):
                writer.board.flush()  # without this it waits two minutes
    writer.close()
    assert printed == []
    for fault in (OSError(28, "No space left on device"), KeyError("a defect")):
        threading.excepthook(threading.ExceptHookArgs((type(fault), fault, None, None)))
    assert [str(error) for error in printed] == ["'a defect'"]


def test_weights_and_biases_resumes_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One identity over all restarts; a refusal, for example without a key, is one sentence."""
    opened: list[dict[str, str]] = []
    fault: type[Exception] = type("UsageError", (Exception,), {})
    stub = types.ModuleType("wandb")
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stub.errors = types.SimpleNamespace(Error=fault)  # type: ignore[attr-defined]
    logged: list[tuple[dict[str, float], int]] = []
    tracker = types.SimpleNamespace(
        finish=lambda: None, log=lambda values, step: logged.append((values, step))
    )
    stub.init = lambda **options: opened.append(options) or tracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for step in (0, 3):
        writer = MetricsWriter(
            tmp_path, step=step, tensorboard=False, wandb=True, wandb_project="p", name="n"
        )
        writer.write({"kind": "step", "step": step + 1, "loss": 2.5, "norm": None})
        writer.close()
    assert logged == [({"step/loss": 2.5}, 1), ({"step/loss": 2.5}, 4)]
    assert opened[0] == opened[1] and opened[0]["resume"] == "allow" and len(opened[0]["id"]) == 16

    def refuse(**_: str) -> None:
        raise fault("No API key\nconfigured.")

    stub.init = refuse  # type: ignore[attr-defined]
    with pytest.raises(
        ResourceError,
        match=r"refuses \(No API key configured\.\): export WANDB_API_KEY, or WANDB_MODE=offline",
    ):
        MetricsWriter(tmp_path, step=3, tensorboard=False, wandb=True, wandb_project="p", name="n")
