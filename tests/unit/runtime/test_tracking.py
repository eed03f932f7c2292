"""Progress and metrics files."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import os
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path

import pytest

from pocl_ds.errors import ResourceError
from pocl_ds.runtime import tracking
from pocl_ds.runtime.tracking import MetricsWriter, Progress, Spikes, aligned, read_metrics


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(tracking.log, "level", logging.INFO)
    monkeypatch.setattr(tracking.log, "info", lambda text, *values: said.append(text % values))
    return said


def test_the_last_state_is_said_once(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FILE_INTERVAL", 0.0)
    with Progress(3, "steps", "train") as progress:
        for _ in range(3):
            progress.advance(loss=1.23456)
    assert len(lines) == 3
    assert lines[-1].startswith("train  3/3 steps") and lines[-1].endswith("loss 1.235")


def test_a_log_file_that_cannot_be_written_is_told_of_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not by a traceback a line, which is logging's own way; and the terminal still has every line."""
    tracking.setup_logging()
    tracking.keep_log(Path("/dev/full"))
    for number in range(3):
        tracking.log.info("line %d", number)
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    told = "/dev/full cannot be written (No space left on device): lines are lacking there from here on"
    assert said == ["line 0", told, "line 1", "line 2"]


def test_a_terminal_that_is_gone_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main, side = os.openpty()
    terminal = open(side, "w", encoding="utf-8")  # noqa: SIM115 # closing it fails too
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tracking, "TERMINAL_INTERVAL", 0.0)
    tracking.setup_logging()
    tracking.keep_log(tmp_path / "log")
    try:
        with Progress(2, "steps", "train") as progress:
            progress.advance()
            os.close(main)
            with pytest.raises(OSError, match="Input/output"):
                print("nobody is there", file=terminal, flush=True)
            progress.advance()
        tracking.log.info("the end")
    finally:
        monkeypatch.undo()
        with suppress(OSError):
            terminal.close()
    kept = (tmp_path / "log").read_text()
    assert "train  2/2 steps" in kept and "the end" in kept


def test_what_was_not_said_is_said_at_the_end(lines: list[str]) -> None:
    with Progress(3, "samples", "score", done=1) as progress:
        progress.advance(2)
    assert len(lines) == 1 and lines[0].startswith("score  3/3 samples")


def test_nothing_done_is_nothing_said(lines: list[str]) -> None:
    with Progress(3, "samples", "score", done=3):
        pass
    assert lines == []


def test_slow_work_is_seconds_a_unit(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(2, "steps", "train")
    progress.start -= 20
    progress.advance()
    progress.close()
    assert "20.0 s/step " in lines[0] and "ETA 0:20" in lines[0]


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
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


def test_metrics_on_a_full_disk_are_told_by_their_file(tmp_path: Path) -> None:
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


def test_tensorboard_on_a_full_disk_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread's error reaches whoever writes next, and is not printed besides."""
    monkeypatch.setattr(threading, "excepthook", lambda fault: printed.append(fault.exc_value))
    printed: list[object] = []
    writer = MetricsWriter(
        tmp_path, step=0, tensorboard=True, wandb=False, wandb_project="", name=""
    )
    (file,) = (tmp_path / "tensorboard").iterdir()
    (tmp_path / "full").symlink_to("/dev/full")
    os.replace(tmp_path / "full", file)  # at once: the thread may be about to write its first event
    with pytest.raises(
        ResourceError, match=f"the disk is full while writing {tmp_path / 'tensorboard'}: free"
    ):
        for step in range(200):
            writer.write({"kind": "step", "step": step, "loss": 1.0})
            with suppress(OSError):
                writer.board.flush()  # else it waits two minutes
    writer.close()
    assert printed == []
    for fault in (OSError(28, "No space left on device"), KeyError("a defect")):
        threading.excepthook(threading.ExceptHookArgs((type(fault), fault, None, None)))
    assert [str(one) for one in printed] == ["'a defect'"]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One identity over all restarts; a refusal, as of one without a key, is one sentence."""
    begun: list[dict[str, str]] = []
    fault: type[Exception] = type("UsageError", (Exception,), {})
    stub = types.ModuleType("wandb")
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stub.errors = types.SimpleNamespace(Error=fault)  # type: ignore[attr-defined]
    logged: list[tuple[dict[str, float], int]] = []
    tracker = types.SimpleNamespace(
        finish=lambda: None, log=lambda values, step: logged.append((values, step))
    )
    stub.init = lambda **options: begun.append(options) or tracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for step in (0, 3):
        writer = MetricsWriter(
            tmp_path, step=step, tensorboard=False, wandb=True, wandb_project="p", name="n"
        )
        writer.write({"kind": "step", "step": step + 1, "loss": 2.5, "norm": None})
        writer.close()
    assert logged == [({"step/loss": 2.5}, 1), ({"step/loss": 2.5}, 4)]
    assert begun[0] == begun[1] and begun[0]["resume"] == "allow" and len(begun[0]["id"]) == 16

    def refuse(**_: str) -> None:
        raise fault("No API key\nconfigured.")

    stub.init = refuse  # type: ignore[attr-defined]
    with pytest.raises(
        ResourceError,
        match=r"refuses \(No API key configured\.\): export WANDB_API_KEY, or WANDB_MODE=offline",
    ):
        MetricsWriter(tmp_path, step=3, tensorboard=False, wandb=True, wandb_project="p", name="n")


def test_a_spike_is_a_jump_and_not_a_slope() -> None:
    spikes = Spikes()
    slope = [4.0 - 0.02 * step + 0.01 * (step % 3) for step in range(40)]
    assert [spikes.seen(loss, 0) for loss in slope] == [None] * 40
    times = spikes.seen(9.0, 0)
    assert times is not None and times == pytest.approx(9.0 / 3.5, rel=0.05)
    assert spikes.seen(3.2, 0) is None
    assert [spikes.seen(12.0, 1) for _ in range(5)] == [None] * 5  # another stage has another loss
    constant = Spikes()
    assert [constant.seen(2.0, 0) for _ in range(20)] == [None] * 20 and constant.seen(
        2.3, 0
    ) is None


def test_columns_stand_below_one_another() -> None:
    rows = [["", "loss"], ["student", "4.25"], ["all", "10.5"]]
    assert aligned(rows) == ["         loss", "student  4.25", "all      10.5"]
    assert aligned(rows, numbers=True, rule=True) == [
        "         loss",
        "-------  ----",
        "student  4.25",
        "all      10.5",
    ]
    assert aligned([["a", "bb"], ["a", "b"]], numbers=True) == ["a  bb", "a   b"]
