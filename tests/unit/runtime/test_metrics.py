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


OPTIONS = {"tensorboard": False, "wandb": False, "wandb_project": "", "name": "x"}


def write_steps(folder: Path, count: int) -> list[bytes]:
    """Write the records of so many steps; returns their lines."""
    writer = MetricsWriter(folder, step=0, **OPTIONS)  # type: ignore[arg-type]
    for step in range(1, count + 1):
        writer.write({"kind": "step", "step": step, "loss": 1.0 / step})
    writer.close()
    return (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "line", [b"{\n", b"\xff\xfe\n", b"[1]\n", b'{"kind": "step"}\n', b"\0" * 9]
)
def test_a_damaged_line_costs_no_other_record(
    line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything behind it was dropped, or it was a traceback at every start."""
    lines = write_steps(tmp_path, 5)
    newline = b"" if line.endswith(b"\n") else b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:2], line, newline, *lines[3:]]))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 4, 5]
    MetricsWriter(tmp_path, step=4, **OPTIONS).close()  # type: ignore[arg-type]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join([*lines[:2], lines[3]])
    assert "metrics.jsonl: line 3 cannot be read and is dropped" in caplog.text
    assert "lacks the records of 1 of 4 optimizer steps (3): the weights are" in caplog.text


@pytest.mark.parametrize("tail", [b'{"kind": "st', b"\xff\xfe", b""])
def test_lost_records_are_named(
    tail: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that lost power may have lost the end of the file."""
    lines = write_steps(tmp_path, 9)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], *lines[2:5]]) + tail)
    MetricsWriter(tmp_path, step=8, **OPTIONS).close()  # type: ignore[arg-type]
    assert "lacks the records of 4 of 8 optimizer steps (2, 6 to 8)" in caplog.text
    assert "cannot be read" not in caplog.text


def test_a_complete_file_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = write_steps(tmp_path, 3)
    skipped = b'{"kind": "skipped", "step": 4}\n'
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(skipped + b'{"kind": "validation", "step": 4')  # a kill cut this line short
    MetricsWriter(tmp_path, step=4, **OPTIONS).close()  # type: ignore[arg-type]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join([*lines, skipped])
    assert caplog.text == ""


def test_records_are_on_the_disk_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    writer = MetricsWriter(tmp_path, step=0, **OPTIONS)  # type: ignore[arg-type]
    writer.write({"kind": "step", "step": 1})
    writer.sync()
    writer.close()
    assert synced[-1] == (tmp_path / "metrics.jsonl").stat().st_size > 0


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
