"""Checkpoints: retention, saves in the background, and failed or damaged checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifests import edit_manifest

from pocl_ds.config import CheckpointConfig
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.workflow.files import file_digest
from pocl_ds.workflow.manifest import read_manifest


class Engine:
    """Saves one number. The writer waits for `gate` and raises `fault`, if it is set."""

    def __init__(self) -> None:
        self.value, self.loaded = 0, 0
        self.resharded: list[bool] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.copied: list[bool] = []

    def snapshot(self, directory: Path, *, copy: bool) -> Any:
        value = self.value
        self.copied.append(copy)

        def write() -> list[Path]:
            assert self.gate.wait(20)
            if self.fault:
                raise self.fault
            (directory / "weights").write_text(str(value))
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
    store: Checkpoints, engine: Any, step: int, *, is_final: bool = False, loss: float | None = None
) -> None:
    engine.value = step
    store.save(step, engine, is_final=is_final, validation_loss=loss)


@pytest.mark.parametrize(
    ("config", "retained"),
    [
        ({"keep_last": 1}, [9]),
        ({"keep_last": 3}, [7, 8, 9]),
        ({"keep_last": 1, "keep_every_n_steps": 4}, [4, 8, 9]),
        ({"keep_last": 2, "keep_best": True}, [5, 8, 9]),
        ({"keep_last": 1, "keep_every_n_steps": 3, "keep_best": True}, [3, 5, 6, 9]),
    ],
)
def test_retention(config: dict[str, Any], retained: list[int], tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path, **config), Engine()
    losses = {2: 4.0, 5: 3.0, 7: 3.5}
    for step in range(1, 10):
        save(store, engine, step, loss=losses.get(step))
    assert store.steps() == retained
    manifest = read_manifest(tmp_path / "checkpoints" / f"step-{retained[-1]:08d}")
    assert (
        manifest
        and manifest.info == {"step": 9}
        and set(manifest.files) == {"weights", "trainer.json"}
    )


def test_a_background_save_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path, async_save=True), Engine()
    engine.gate.clear()
    save(store, engine, 1)
    assert store.is_writing and store.steps() == []
    engine.value = 77  # training continues
    threading.Timer(0.2, engine.gate.set).start()
    store.finalize_async_save()  # waits
    assert not store.is_writing and store.steps() == [1]
    assert (tmp_path / "checkpoints" / "step-00000001" / "weights").read_text() == "1"
    save(store, engine, 2)
    # A final save completes the previous one and does not use a thread.
    save(store, engine, 3, is_final=True)
    assert store.steps() == [2, 3] and engine.copied == [True, True, False]
    store.finalize_async_save()


def test_a_failed_background_save_is_reported_when_it_is_finalized(
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
    ("fault", "reason"),
    [
        (OSError(28, "No space left on device"), "rank 0: No space left on device;"),
        (OSError("the disk went away"), "rank 0: the disk went away;"),
        (
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
            "rank 0: no space left on the disk;",
        ),
        (ArtifactError("the folder is foreign"), "rank 0: the folder is foreign;"),
    ],
)
def test_a_second_failure_in_a_row_or_a_failed_final_save_ends_the_run(
    fault: Exception, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    for step in (1, 2, 3, 4):  # every second save succeeds
        engine.fault = fault if step % 2 else None
        save(store, engine, step)
        assert store.steps() == list(range(2, step + 1, 2))
    assert (
        f"step 1 could not be saved to {tmp_path / 'checkpoints'} ({reason} there is no checkpoint "
        f"yet): training" in caplog.text
    )
    assert (
        f"({reason} the newest checkpoint is that of step 2): training continues, and stops if "
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
        save(checkpoints(tmp_path), engine, 7, is_final=True)
    assert store.steps() == [2, 4]


def test_a_directory_that_cannot_be_created_is_a_failed_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    save(checkpoints(tmp_path), Engine(), 1)
    assert "step 1 could not be saved" in caplog.text
    with pytest.raises(
        ResourceError, match="step 1 could not be saved .*there is no checkpoint yet"
    ):
        save(checkpoints(tmp_path), Engine(), 1, is_final=True)


def test_a_manifest_that_cannot_be_written_is_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)

    def full(*_: Any) -> None:
        raise ResourceError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("pocl_ds.training.checkpoint.save_manifest", full)
        patched.setattr("pocl_ds.training.checkpoint.write_json", lambda path, value: None)
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


def test_an_unreadable_checkpoint_is_skipped(
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


def test_a_defect_is_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    engine = Engine()
    engine.fault = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="^a defect$"):
        save(checkpoints(tmp_path), engine, 1)


def test_other_ranks_write_only_their_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    store, engine, partial = (
        checkpoints(tmp_path),
        Engine(),
        tmp_path / "checkpoints" / "step-00000001.partial",
    )
    partial.mkdir(parents=True)
    (partial / "rank-0-file").touch()
    save(store, engine, 1)
    engine.fault = OSError(28, "No space left on device")
    save(store, engine, 1)
    assert (
        sorted(path.name for path in partial.iterdir()) == ["rank-0-file", "weights"]
        and store.steps() == []
    )


def test_a_checkpoint_of_other_ranks_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The original stays; the next save removes the converted checkpoint."""
    caplog.set_level(logging.INFO)
    store, engine = checkpoints(tmp_path), Engine()
    resharded = tmp_path / "checkpoints" / "resharded"
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine.value = 7
    store.save(7, engine, is_final=False, policy_state={"phi": 0.5})  # type: ignore[arg-type]
    assert checkpoints(tmp_path).load(engine) == (7, {"phi": 0.5}) and engine.resharded == [False]  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "1")
    for is_repeated in (False, True):
        if is_repeated:
            (resharded / "partial").touch()  # from an interrupted conversion
        assert checkpoints(tmp_path).load(engine) == (7, {"phi": 0.5}) and engine.loaded == 7  # type: ignore[arg-type]
        assert [path.name for path in resharded.iterdir()] == ["weights"]
    assert (
        engine.resharded == [False, True, True]
        and "was written by 2 ranks: converting it for 1" in caplog.text
    )
    engine.fault = OSError(28, "No space left on device")
    with pytest.raises(ResourceError, match=f"the disk is full while writing {resharded}"):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]
    engine.fault = None
    assert store.steps() == [7]
    save(store, engine, 8)
    assert store.steps() == [7, 8] and not resharded.exists()


def test_a_damaged_checkpoint_does_not_replace_an_intact_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store, engine = checkpoints(tmp_path, keep_last=1, keep_every_n_steps=10), Engine()
    save(store, engine, 10)
    save(store, engine, 20)
    (tmp_path / "checkpoints" / "step-00000020" / "weights").write_text("21")
    resumed = checkpoints(tmp_path, keep_last=1)
    assert resumed.load(engine) == (10, {}) and engine.loaded == 10  # type: ignore[arg-type]
    assert (
        "resuming from step 10, 10 steps run again; the damaged files stay as *.damaged"
        in caplog.text
    )
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.damaged")] == [
        "step-00000020.damaged"
    ]
    save(resumed, engine, 15)
    assert resumed.steps() == [15] and not list((tmp_path / "checkpoints").glob("*.damaged"))


def test_exchanged_folders_are_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training continued from the wrong weights, as step 30 of those of step 20."""
    store, engine = checkpoints(tmp_path, keep_last=3), Engine()
    for step in (10, 20, 30):
        save(store, engine, step)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000030").rename(folder / "other")
    (folder / "step-00000020").rename(folder / "step-00000030")
    (folder / "other").rename(folder / "step-00000020")
    assert checkpoints(tmp_path).load(engine) == (10, {}) and engine.loaded == 10  # type: ignore[arg-type]
    assert "step-00000030 is damaged (it is the checkpoint of step 20)" in caplog.text
    assert "step-00000020 is damaged (it is the checkpoint of step 30)" in caplog.text


@given(st.data())
def test_any_flipped_bit_of_a_manifest_leads_to_the_checkpoint_before(data: st.DataObject) -> None:
    """Some were taken for another recipe, whose advice is another run directory."""
    with tempfile.TemporaryDirectory() as name:
        store, engine = checkpoints(Path(name), keep_last=2), Engine()
        save(store, engine, 10)
        save(store, engine, 20)
        path = Path(name) / "checkpoints" / "step-00000020" / "manifest.json"
        content = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        step, _ = checkpoints(Path(name)).load(engine)  # type: ignore[arg-type]
        assert step == engine.loaded and step in (10, 20)  # white space may change


def test_folders_with_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """A copy by hand was a traceback at the next start, and any `*.partial` was removed."""
    store, engine = checkpoints(tmp_path, keep_last=1), Engine()
    save(store, engine, 10)
    folder, others = tmp_path / "checkpoints", ("notes.partial", "my.damaged")
    names = ("step-00000010-backup", "step-10", "step-000000010", "step-00000010 (copy)", *others)
    for name in names:
        shutil.copytree(folder / "step-00000010", folder / name)
    assert checkpoints(tmp_path).load(engine) == (10, {})  # type: ignore[arg-type]
    save(store, engine, 20)
    assert {path.name for path in folder.iterdir()} == {"step-00000020", *names}


@pytest.mark.parametrize("text", ["", '{"stage": "checkpoint"'])
def test_a_damaged_manifest_makes_a_damaged_checkpoint(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, engine = checkpoints(tmp_path, keep_last=2, keep_best=True), Engine()
    save(store, engine, 10, loss=1.0)
    save(store, engine, 20, loss=2.0)
    (tmp_path / "checkpoints" / "step-00000020" / "manifest.json").write_text(text)
    assert checkpoints(tmp_path).load(engine) == (10, {}) and engine.loaded == 10  # type: ignore[arg-type]
    assert "step-00000020 is damaged (manifest.json is missing or damaged)" in caplog.text
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").write_text(text)
    save(store, engine, 30, loss=3.0)  # retention uses the readable manifests
    assert store.steps() == [10, 30]


def test_a_checkpoint_of_another_program_is_refused_and_not_changed(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 10)
    save(store, engine, 20)
    edit_manifest(tmp_path / "checkpoints" / "step-00000020" / "manifest.json", schema=9)
    with pytest.raises(ArtifactError, match="has schema 9"):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]
    assert store.steps() == [10, 20]


def test_a_checkpoint_gets_its_name_after_its_data_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that dies loses data that its file system has not written: files are synchronized
    before the rename.
    """
    synced: set[str] = set()
    sync, rename = os.fsync, os.replace
    synced_before_rename: list[set[str]] = []

    def record_sync(handle: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def record_rename(source: Path, target: Path) -> None:
        if Path(target).name == "step-00000001":
            synced_before_rename.append(set(synced))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    assert len(synced_before_rename) == 1
    assert {"weights", "step-00000001.partial"} <= synced_before_rename[0]


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_named(
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


def test_training_starts_at_step_0_without_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert checkpoints(tmp_path).load(Engine()) == (0, {})  # type: ignore[arg-type]
    leftover = tmp_path / "checkpoints" / "step-00000003.partial"
    leftover.mkdir(parents=True)
    assert checkpoints(tmp_path).load(Engine()) == (0, {}) and not leftover.exists()  # type: ignore[arg-type]
    assert f"removing {leftover}, an incomplete checkpoint of an interrupted save" in caplog.text


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path: Path) -> None:
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
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, fingerprint: str) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    other = Checkpoints(store.directory, store.config, fingerprint=fingerprint)
    with pytest.raises(
        ArtifactError,
        match="step-00000001 belongs to another recipe or other data: use another --run-dir",
    ):
        other.load(engine)  # type: ignore[arg-type]
    assert store.steps() == [1]


def test_damaged_checkpoints_alone_are_refused_and_not_changed(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), Engine()
    save(store, engine, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "weights").write_text("")
    before = sorted(p.name for p in (tmp_path / "checkpoints").rglob("*"))
    with pytest.raises(
        ArtifactError, match=r"none of the checkpoints .* is intact \(.*\): restore one, or remove"
    ):
        checkpoints(tmp_path).load(engine)  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "checkpoints").rglob("*")) == before


def test_a_save_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    """It happens if training resumes from an earlier checkpoint and reaches that step again."""
    store, engine = checkpoints(tmp_path, keep_last=2), Engine()
    save(store, engine, 10)
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").write_text("")
    save(store, engine, 10)
    assert store.steps() == [10] and checkpoints(tmp_path).load(engine) == (10, {})  # type: ignore[arg-type]
