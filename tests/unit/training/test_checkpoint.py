"""Checkpoints: what is kept, what is written in the background, and what a failed or damaged one
costs.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import CheckpointConfig
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.workflow.files import file_digest
from pocl_ds.workflow.manifest import MANIFEST, read_manifest


class Engine:
    """One file with a number in it; a gate holds the writer back, a fault stops it."""

    def __init__(self) -> None:
        self.value, self.loaded = 0, 0
        self.resharded: list[bool] = []
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
        self.resharded.append(resharded)

    def reshard(self, source: Path, target: Path) -> None:
        if self.fault:
            raise self.fault
        assert not list(target.iterdir())
        (target / "weights").write_text((source / "weights").read_text())


def checkpoints(folder: Path, **config: Any) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", CheckpointConfig(**config), fingerprint="f")


def save(
    store: Checkpoints, engine: Any, step: int, *, last: bool = False, loss: float | None = None
) -> None:
    engine.value = step
    store.save(step, engine, is_final=last, validation_loss=loss)


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"keep_last": 1}, [9]),
        ({"keep_last": 3}, [7, 8, 9]),
        ({"keep_last": 1, "keep_every_n_steps": 4}, [4, 8, 9]),
        ({"keep_last": 2, "keep_best": True}, [5, 8, 9]),
        ({"keep_last": 1, "keep_every_n_steps": 3, "keep_best": True}, [3, 5, 6, 9]),
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
    store, engine = checkpoints(tmp_path, async_save=True), Engine()
    engine.gate.clear()
    save(store, engine, 1)
    assert store.is_writing and store.steps() == []
    engine.value = 77  # training goes on
    threading.Timer(0.2, engine.gate.set).start()
    store.finalize_async_save()  # waits
    assert not store.is_writing and store.steps() == [1]
    assert (tmp_path / "checkpoints" / "step-00000001" / "weights").read_text() == "1"
    save(store, engine, 2)
    save(
        store, engine, 3, last=True
    )  # the last one is not left to a thread, and the one before is sealed first
    assert store.steps() == [2, 3] and engine.copied == [True, True, False]
    store.finalize_async_save()


def test_what_fails_in_the_background_is_said_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path, async_save=True), Engine()
    save(store, engine, 1)
    engine.fault = OSError(28, "No space left on device")
    save(store, engine, 2)
    store.finalize_async_save()
    assert (
        "step 2 could not be saved" in caplog.text
        and "that of step 1" in caplog.text
        and store.steps() == [1]
    )
    save(store, engine, 3)
    with pytest.raises(ResourceError, match=r"step 3 could not be saved .*No space left"):
        store.finalize_async_save()
    assert store.steps() == [1] and not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_defect_in_the_background_is_not_swallowed(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path, async_save=True), Engine()
    engine.fault = KeyError("a defect")
    save(store, engine, 1)
    with pytest.raises(KeyError, match="a defect"):
        store.finalize_async_save()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OSError(28, "No space left on device"), "rank 0: No space left on device;"),
        (OSError("the disk went away"), "rank 0: the disk went away;"),
        (
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
            "rank 0: no space left on the disk;",
        ),
        (ArtifactError("the folder is not ours"), "rank 0: the folder is not ours;"),
    ],
)
def test_a_second_failure_in_a_row_or_the_last_chance_ends_the_run(
    fault: Exception, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    for step in (1, 2, 3, 4):  # those that succeed lie between
        engine.fault = fault if step % 2 else None
        save(store, engine, step)
        assert store.steps() == list(range(2, step + 1, 2))
    assert (
        f"step 1 could not be saved to {tmp_path / 'checkpoints'} ({told} there is no checkpoint "
        f"yet): training" in caplog.text
    )
    assert (
        f"({told} the newest checkpoint is that of step 2): training continues, and stops if "
        f"the next save fails too" in caplog.text
    )
    assert {record.name for record in caplog.records} == {"pocl_ds"}
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    engine.fault = fault
    save(store, engine, 5)
    with pytest.raises(
        ResourceError, match="step 6 could not be saved .* step 4.: free some space and start again"
    ):
        save(store, engine, 6)
    with pytest.raises(ResourceError, match="step 7 could not be saved"):
        save(checkpoints(tmp_path), engine, 7, last=True)
    assert store.steps() == [2, 4]


def test_a_place_that_cannot_be_made_is_told_as_other_faults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    save(checkpoints(tmp_path), Engine(), 1)
    assert "step 1 could not be saved" in caplog.text
    with pytest.raises(
        ResourceError, match="step 1 could not be saved .*there is no checkpoint yet"
    ):
        save(checkpoints(tmp_path), Engine(), 1, last=True)


def test_a_seal_that_fails_is_a_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)

    def full(*_: Any) -> None:
        raise ResourceError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(
            "pocl_ds.training.checkpoint.write_json",
            lambda path, value: full() if path.name == MANIFEST else None,
        )
        patched.setattr("pocl_ds.training.checkpoint.fsync_path", lambda path: None)
        patched.setattr("pocl_ds.training.checkpoint.file_digest", lambda path: {})
        save(store, engine, 2)
        assert (
            "step 2 could not be saved" in caplog.text
            and "(rank 0: the disk is full; the newest" in caplog.text
        )
        with pytest.raises(ResourceError, match="step 3 could not be saved"):
            save(store, engine, 3)
    assert store.steps() == [1] and not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    for step in (1, 2):
        save(store, engine, step)

    def digest(path: Path) -> dict[str, Any]:
        if "00000002" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return file_digest(path)

    monkeypatch.setattr("pocl_ds.workflow.manifest.file_digest", digest)
    assert checkpoints(tmp_path).load(engine)[0] == 1  # type: ignore[arg-type]
    assert "it cannot be read (Input/output error)" in caplog.text


def test_a_defect_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    engine = Engine()
    engine.fault = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="^a defect$"):
        save(checkpoints(tmp_path), engine, 1)


def test_other_ranks_write_their_files_and_leave_the_rest_to_rank_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    store, engine, partial = (
        checkpoints(tmp_path),
        Engine(),
        tmp_path / "checkpoints" / "step-00000001.partial",
    )
    partial.mkdir(parents=True)
    (partial / "theirs").touch()
    save(store, engine, 1)
    engine.fault = OSError(28, "No space left on device")
    save(store, engine, 1)
    assert (
        sorted(path.name for path in partial.iterdir()) == ["theirs", "weights"]
        and store.steps() == []
    )


def test_a_checkpoint_of_other_ranks_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The original stays; what was made of it goes with the next save."""
    caplog.set_level(logging.INFO)
    store, engine, made = checkpoints(tmp_path), Engine(), tmp_path / "checkpoints" / "resharded"
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine.value = 7
    store.save(7, engine, is_final=False, policy_state={"phi": 0.5})  # type: ignore[arg-type]
    assert checkpoints(tmp_path).load(engine) == (7, {"phi": 0.5}) and engine.resharded == [False]  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "1")
    for again in (False, True):
        if again:
            (made / "left").touch()  # of a conversion that was cut short
        assert checkpoints(tmp_path).load(engine) == (7, {"phi": 0.5}) and engine.loaded == 7  # type: ignore[arg-type]
        assert [path.name for path in made.iterdir()] == ["weights"]
    assert (
        engine.resharded == [False, True, True]
        and "was written by 2 ranks: converting it for 1" in caplog.text
    )
    engine.fault = OSError(28, "No space left on device")
    with pytest.raises(ResourceError, match=f"the disk is full while writing {made}"):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]
    engine.fault = None
    assert store.steps() == [7]
    save(store, engine, 8)
    assert store.steps() == [7, 8] and not made.exists()


def test_a_damaged_one_does_not_push_out_the_whole_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store, engine = checkpoints(tmp_path, keep_last=1, keep_every_n_steps=10), Engine()
    save(store, engine, 10)
    save(store, engine, 20)
    (tmp_path / "checkpoints" / "step-00000020" / "weights").write_text("21")
    again = checkpoints(tmp_path, keep_last=1)
    assert again.load(engine) == (10, {}) and engine.loaded == 10  # type: ignore[arg-type]
    assert (
        "resuming from step 10, 10 steps run again; the damaged files stay as *.damaged"
        in caplog.text
    )
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.damaged")] == [
        "step-00000020.damaged"
    ]
    save(again, engine, 15)
    assert again.steps() == [15] and not list((tmp_path / "checkpoints").glob("*.damaged"))


@pytest.mark.parametrize("text", ["", '{"stage": "checkpoint"'])
def test_a_damaged_manifest_is_damage_as_any_other(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path, keep_last=2, keep_best=True), Engine()
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


def test_a_checkpoint_has_its_name_when_its_data_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that dies takes with it what its file system has not written: a name must not be there
    before.
    """
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


def test_a_damaged_one_that_cannot_be_set_aside_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    save(store, engine, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "weights").unlink()

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(
        ArtifactError,
        match="step-00000002 cannot be written .Permission denied.: choose another --run-dir",
    ):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]


def test_where_nothing_was_saved_training_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert checkpoints(tmp_path).load(Engine()) == (0, {})  # type: ignore[arg-type]
    leftover = tmp_path / "checkpoints" / "step-00000003.partial"
    leftover.mkdir(parents=True)
    assert checkpoints(tmp_path).load(Engine()) == (0, {}) and not leftover.exists()  # type: ignore[arg-type]
    assert f"removing {leftover}, an incomplete checkpoint of an interrupted save" in caplog.text


def test_one_of_another_dtype_is_refused(tmp_path: Path) -> None:
    """With student.dtype=auto the dtype depends on the machine, and not on the fingerprint."""
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    other = Checkpoints(
        store.directory, store.config, fingerprint=store.fingerprint, dtype="bfloat16"
    )
    with pytest.raises(ArtifactError, match="was trained in float32, and this machine trains in"):
        other.load(engine)  # type: ignore[arg-type]
    assert store.steps() == [1]


@pytest.mark.parametrize("fingerprint", ["e", "g", ""])
def test_one_of_another_recipe_is_refused(tmp_path: Path, fingerprint: str) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    other = Checkpoints(store.directory, store.config, fingerprint=fingerprint)
    with pytest.raises(
        ArtifactError,
        match="step-00000001 belongs to another recipe or other data: use another --run-dir",
    ):
        other.load(engine)  # type: ignore[arg-type]
    assert store.steps() == [1]


def test_none_whole_is_refused_and_left_alone(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "weights").write_text("")
    before = sorted(p.name for p in (tmp_path / "checkpoints").rglob("*"))
    with pytest.raises(
        ArtifactError, match="none of the checkpoints .* is intact: remove that directory"
    ):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "checkpoints").rglob("*")) == before


def test_a_step_is_saved_over_what_stands_in_its_name(tmp_path: Path) -> None:
    """As where a damaged checkpoint of a later step was left, and training comes there again."""
    store, engine = checkpoints(tmp_path, keep_last=2), Engine()
    save(store, engine, 10)
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").write_text("")
    save(store, engine, 10)
    assert store.steps() == [10] and checkpoints(tmp_path).load(engine) == (10, {})  # type: ignore[arg-type]
