"""The run directory: a result is whole or not there, and what is damaged is named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.artifacts import (
    SCHEMA,
    atomic_directory,
    atomic_write,
    damaged_files,
    fingerprint,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from pocl_ds.errors import ArtifactError, ResourceError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with atomic_write(target) as stream:
        stream.write("ä")
        assert not target.exists()
    assert target.read_bytes() == "ä".encode()
    with atomic_write(target, "wb") as stream:
        stream.write(b"\x00")
    assert target.read_bytes() == b"\x00"
    assert names(target.parent) == ["file"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(fault), atomic_write(target) as stream:
        stream.write("new")
        raise fault
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ResourceError, match="disk is full") as caught, atomic_write(target) as stream:
        stream.write("new")
    assert str(target) in str(caught.value)
    assert caught.value.exit_code == 2
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EDQUOT, ResourceError), (errno.EACCES, ArtifactError), (errno.EROFS, ArtifactError)]
)
def test_other_faults_of_a_disk(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="file"), atomic_write(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_a_fault_that_is_not_the_disks_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="exec") as caught, atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOEXEC, "exec format")
    assert not isinstance(caught.value, (ArtifactError, ResourceError))


@pytest.mark.parametrize(("mask", "modes"), [(0o022, [0o644, 0o755, 0o644, 0o744]), (0o077, [0o600, 0o700, 0o600, 0o700]),
                                             (0o027, [0o640, 0o750, 0o640, 0o740])])  # fmt: skip
def test_the_umask_says_who_may_read(tmp_path: Path, mask: int, modes: list[int]) -> None:
    """Also files whose writer is stricter, as safetensors is."""
    before = os.umask(mask)
    try:
        write_json(tmp_path / "file", {})
        with atomic_directory(tmp_path / "final") as folder:
            (folder / "sub").mkdir()
            for name, mode in (("private", 0o600), ("sub/program", 0o700)):
                (folder / name).touch()
                (folder / name).chmod(mode)
    finally:
        os.umask(before)
    names = ("file", "final", "final/private", "final/sub/program")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in names] == modes


def test_nobody_touches_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: a checkpoint that another thread writes would be everyone's to change."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    write_json(tmp_path / "file", {})
    with atomic_directory(tmp_path / "final") as folder:
        (folder / "x").touch()


def test_atomic_directory(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with atomic_directory(target) as folder:
        (folder / "b").write_text("3")
    assert names(target) == ["b"]
    assert names(tmp_path) == ["final"]


def test_a_full_disk_in_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ResourceError), atomic_directory(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
        full_disk()
    assert names(tmp_path) == []


def make_result(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(200)))


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    make_result(tmp_path)
    assert read_manifest(tmp_path) is None
    written = write_manifest(tmp_path, "data", "f" * 64, info={"samples": 3})
    assert read_manifest(tmp_path) == written
    assert sorted(written.files) == ["a.txt", "sub/b.bin"]
    assert written.files["a.txt"]["bytes"] == 5
    assert written.info.pop("peak_host_bytes") > 2**20
    assert written.info == {"samples": 3}
    assert "numpy" in written.versions
    assert damaged_files(tmp_path, written) == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make_result(tmp_path)
    manifest = write_manifest(tmp_path, "data", "f")
    (tmp_path / "a.txt").write_text("alphA")  # same size
    assert damaged_files(tmp_path, manifest) == ["a.txt has another checksum"]
    assert damaged_files(tmp_path, manifest, checksums=False) == []
    (tmp_path / "a.txt").write_text("alph")
    (tmp_path / "sub" / "b.bin").unlink()
    assert damaged_files(tmp_path, manifest) == ["a.txt has 4 bytes instead of 5", "sub/b.bin is missing"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"stage": "x"', "damaged"),
        ('{"what": 1}', "not a manifest"),
        (json.dumps({"stage": "", "fingerprint": "", "files": {}, "schema": SCHEMA + 1}), "schema"),
    ],
)
def test_a_damaged_manifest_is_not_an_unfinished_one(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=word) as caught:
        read_manifest(tmp_path)
    assert "manifest.json" in str(caught.value)


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": [1, 2.5, None]})
    assert read_json(tmp_path / "x.json") == {"ä": [1, 2.5, None]}
    with pytest.raises(ArtifactError, match="missing"):
        read_json(tmp_path / "y.json")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=5), plain, max_size=5))
def test_a_fingerprint_is_of_the_values_not_of_their_order(tree: dict[str, object]) -> None:
    assert fingerprint(tree) == fingerprint(dict(reversed(tree.items())))
    assert fingerprint(tree) != fingerprint({**tree, "a key that is long": 1})


def test_a_directory_has_its_name_when_its_files_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    sync, rename = os.fsync, os.replace

    def seen(handle: int) -> None:
        written.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        written.append("named")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_directory(tmp_path / "made") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "one").write_text("1")
        (folder / "two").write_text("2")
    assert set(written[: written.index("named")]) == {"one", "two"} and written[-1] == tmp_path.name
