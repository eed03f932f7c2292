"""Checkpoints: what is kept, what is written in the background, and what a failed or damaged one costs."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.artifacts import read_manifest
from pocl_ds.config import CheckpointConfig
from pocl_ds.distill.checkpoint import Checkpoints
from pocl_ds.errors import ArtifactError, ResourceError


class Engine:
    """One file with a number in it; a gate holds the writer back, a fault stops it."""

    def __init__(self) -> None:
        self.value, self.loaded = 0, 0
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.copied: list[bool] = []

    def snapshot(self, directory: Path, *, copy: bool) -> Any:
        taken = self.value
        self.copied.append(copy)

        def write() -> list[Path]:
            assert self.gate.wait(20)
            if self.fault:
                raise self.fault
            (directory / "weights").write_text(str(taken))
            return [directory / "weights"]

        return write

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        self.loaded = int((directory / "weights").read_text())


def checkpoints(folder: Path, **config: Any) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", CheckpointConfig(**config), fingerprint="f")


def save(store: Checkpoints, engine: Any, step: int, *, last: bool = False, loss: float | None = None) -> None:
    engine.value = step
    store.save(step, engine, last_chance=last, validation_loss=loss)


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"keep": 1}, [9]),
        ({"keep": 3}, [7, 8, 9]),
        ({"keep": 1, "keep_every": 4}, [4, 8, 9]),
        ({"keep": 2, "keep_best": True}, [5, 8, 9]),
        ({"keep": 1, "keep_every": 3, "keep_best": True}, [3, 5, 6, 9]),
    ],
)
def test_retention(config: dict[str, Any], left: list[int], tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path, **config), Engine()
    losses = {2: 4.0, 5: 3.0, 7: 3.5}
    for step in range(1, 10):
        save(store, engine, step, loss=losses.get(step))
    assert store.steps() == left
    found = read_manifest(tmp_path / "checkpoints" / f"step-{left[-1]:08d}")
    assert found and found.info == {"step": 9} and set(found.files) == {"weights", "trainer.json"}


def test_a_save_in_the_background_has_no_name_before_it_is_whole(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path, in_background=True), Engine()
    engine.gate.clear()
    save(store, engine, 1)
    assert store.writing and store.steps() == []
    engine.value = 77  # training goes on
    engine.gate.set()
    store.settle()
    assert not store.writing and store.steps() == [1]
    assert (tmp_path / "checkpoints" / "step-00000001" / "weights").read_text() == "1"
    save(store, engine, 2)
    save(store, engine, 3, last=True)  # the last one is not left to a thread, and the one before is sealed first
    assert store.steps() == [2, 3] and engine.copied == [True, True, False]
    store.settle()


def test_what_fails_in_the_background_is_said_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, engine = checkpoints(tmp_path, in_background=True), Engine()
    save(store, engine, 1)
    engine.fault = OSError(28, "No space left on device")
    save(store, engine, 2)
    store.settle()
    assert "step 2 could not be saved" in caplog.text and "that of step 1" in caplog.text and store.steps() == [1]
    save(store, engine, 3)
    with pytest.raises(ResourceError, match=r"step 3 could not be saved .*No space left"):
        store.settle()
    assert store.steps() == [1] and not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_defect_in_the_background_is_not_swallowed(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path, in_background=True), Engine()
    engine.fault = KeyError("a defect")
    save(store, engine, 1)
    with pytest.raises(KeyError, match="a defect"):
        store.settle()


def test_a_damaged_one_does_not_push_out_the_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store, engine = checkpoints(tmp_path, keep=1, keep_every=10), Engine()
    save(store, engine, 10)
    save(store, engine, 20)
    (tmp_path / "checkpoints" / "step-00000020" / "weights").write_text("21")
    again = checkpoints(tmp_path, keep=1)
    assert again.load(engine) == (10, {}) and engine.loaded == 10  # type: ignore[arg-type]
    assert "going on from step 10, 10 steps are trained again" in caplog.text
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.damaged")] == ["step-00000020.damaged"]
    save(again, engine, 15)
    assert again.steps() == [15] and not list((tmp_path / "checkpoints").glob("*.damaged"))


@pytest.mark.parametrize("text", ["", '{"stage": "checkpoint"'])
def test_a_damaged_manifest_is_damage_as_any_other(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, engine = checkpoints(tmp_path, keep=2, keep_best=True), Engine()
    save(store, engine, 10, loss=1.0)
    save(store, engine, 20, loss=2.0)
    (tmp_path / "checkpoints" / "step-00000020" / "manifest.json").write_text(text)
    assert checkpoints(tmp_path).load(engine) == (10, {}) and engine.loaded == 10  # type: ignore[arg-type]
    assert "step-00000020 is damaged (manifest.json is missing or damaged)" in caplog.text
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").write_text(text)
    save(store, engine, 30, loss=3.0)  # what is kept is decided by the manifests that can be read
    assert store.steps() == [10, 30]


def test_one_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 10)
    save(store, engine, 20)
    newest = tmp_path / "checkpoints" / "step-00000020" / "manifest.json"
    newest.write_text(newest.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(ArtifactError, match="has schema 9"):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]
    assert store.steps() == [10, 20]


def test_a_checkpoint_has_its_name_when_its_data_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that dies takes with it what its file system has not written: a name must not be there before."""
    written: set[str] = set()
    sync, rename = os.fsync, os.replace
    named: list[set[str]] = []

    def seen(handle: int) -> None:
        written.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        if Path(target).name == "step-00000001":
            named.append(set(written))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(os, "replace", renamed)
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    assert len(named) == 1 and {"weights", "step-00000001.partial"} <= named[0]


def test_none_whole_is_refused_and_left_alone(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "weights").write_text("")
    before = sorted(p.name for p in (tmp_path / "checkpoints").rglob("*"))
    with pytest.raises(ArtifactError, match="none of the checkpoints .* is whole: remove that directory"):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "checkpoints").rglob("*")) == before
