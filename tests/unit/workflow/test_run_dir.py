"""The run directory: a result is whole or not there, and what is damaged is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ROOT
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.workflow.files import (
    atomic_directory,
    atomic_write,
    describe_file_error,
    explain_disk_errors,
    read_json,
    remove_partial_directories,
    write_json,
)
from pocl_ds.workflow.manifest import (
    SCHEMA,
    Manifest,
    damaged_files,
    fingerprint,
    finished_manifest,
    read_manifest,
    write_manifest,
)
from pocl_ds.workflow.run_dir import RunDirectory, movable_model_path, read_models


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write(tmp_path: Path) -> None:
    target = tmp_path / "far" / "below" / "file"
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


def test_a_fault_is_told_also_where_the_temporary_file_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the fault"), atomic_write(tmp_path / "file"):
        (tmp_path / names(tmp_path)[0]).unlink()
        raise RuntimeError("the fault")


def test_what_has_a_name_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the bytes, then the name, then the directory that holds the name; and nothing stays
    open.
    """
    happened: list[Any] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        happened.append(path if path.is_dir() else path.read_text())
        sync(handle)

    def named(source: Path, target: Path) -> None:
        replace(source, target)
        happened.append(target.name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    opened = len(os.listdir("/proc/self/fd"))
    with atomic_write(tmp_path / "file") as stream:
        stream.write("text")
    assert happened == ["text", "file", tmp_path]
    with atomic_directory(tmp_path / "far" / "below" / "folder"):
        happened.clear()
    assert happened == ["folder", tmp_path / "far" / "below"]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_texts_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from pocl_ds.workflow import files as a; p = Path(sys.argv[1]); "
    code += "a.write_json(p, {'x': chr(228)}); assert a.read_json(p) == {'x': chr(228)}"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.json")],
        env=plain,
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    assert "ä" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with (
        pytest.raises(ResourceError, match="disk is full") as caught,
        atomic_write(target) as stream,
    ):
        stream.write("new")
    assert str(target) in str(caught.value)
    assert caught.value.exit_code == 2
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


LOST_REMEDY = "look at its disk or mount, and whether another process changes what lies there, and start again"


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.EDQUOT, ResourceError, "free some space and start again, finished work is kept"),
        (errno.EACCES, ArtifactError, "choose another --run-dir or change its permissions"),
        (errno.EROFS, ArtifactError, "choose another --run-dir or change its permissions"),
        (errno.ENOTDIR, ArtifactError, "choose another --run-dir or move what is in the way"),
        *(
            (number, ArtifactError, LOST_REMEDY)
            for number in (errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.ENOTEMPTY)
        ),
    ],
)
@pytest.mark.parametrize("build", [atomic_write, atomic_directory])
def test_other_faults_of_a_disk(
    tmp_path: Path, build: Any, number: int, kind: type[Exception], remedy: str
) -> None:
    with pytest.raises(kind) as caught, build(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "file") in str(caught.value) and str(caught.value).endswith(f": {remedy}")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Error while serializing: IoError(Os { code: 28, message: No space left on device })"
        ),
        Exception("No space left on device (os error 28)"),
        Exception("Disk quota exceeded (os error 122)"),
        RuntimeError("[enforce fail at inline_container.cc:779] unexpected pos 64 vs 0"),
        OSError("5000 requested and 0 written"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_full_disk_in_the_words_of_libraries(error: Exception, tmp_path: Path) -> None:
    """Which keep the number to themselves."""
    with (
        pytest.raises(
            ResourceError, match=r"the disk is full while writing .*/file \(.*\): free some space"
        ),
        explain_disk_errors(tmp_path / "file"),
    ):
        raise error


def test_what_others_miss_elsewhere_is_not_the_disks(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/model"),
        ArtifactError("No space left, we said"),
    ):
        with pytest.raises(type(error)) as caught, explain_disk_errors(tmp_path / "file"):
            raise error
        assert caught.value is error


def test_a_folder_that_is_taken_away_meanwhile(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="could not be written .No such file"),
        atomic_write(tmp_path / "below" / "file"),
    ):
        shutil.rmtree(tmp_path / "below")


def test_two_that_build_the_same_directory(tmp_path: Path) -> None:
    """The later one's stays; neither stops the other."""
    with atomic_directory(tmp_path / "made") as one:
        (one / "of").write_text("one")
        with atomic_directory(tmp_path / "made") as two:
            (two / "of").write_text("two")
    assert (tmp_path / "made" / "of").read_text() == "one" and names(tmp_path) == ["made"]
    with (
        pytest.raises(ArtifactError, match="move what is in the way"),
        atomic_directory(tmp_path / "made" / "of"),
    ):
        pass
    assert (tmp_path / "made" / "of").read_text() == "one"


def test_remains_of_what_a_killed_process_built(tmp_path: Path) -> None:
    for name in (".final.0123456789abcdef", ".final.notours", ".other.0123456789abcdef", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    remove_partial_directories(tmp_path / "final")
    assert names(tmp_path) == [".final.notours", ".other.0123456789abcdef", "final"]


def test_a_manifest_that_goes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of an array remove what is stale while others look at it."""
    write_manifest(tmp_path, "preprocess", "f", files=[])
    monkeypatch.setattr(Path, "is_file", lambda path: path.unlink() or True)  # type: ignore[func-returns-value]
    assert read_manifest(tmp_path) is None


def test_a_result_whose_files_are_gone_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    write_manifest(tmp_path, "plan", "f")
    assert finished_manifest(tmp_path, "f") is not None and finished_manifest(tmp_path, "g") is None
    (tmp_path / "plan.json").unlink()
    assert finished_manifest(tmp_path, "f") is None


def test_a_model_of_the_run_moves_with_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "one")
    made = {
        "student": movable_model_path(run, str(run.models / "heal" / "final")),
        "teacher": movable_model_path(run, "/a/teacher"),
    }
    write_json(run.models / "models.json", made)
    run.path.rename(tmp_path / "two")
    found = read_models(RunDirectory(tmp_path / "two"))
    assert found == {
        "student": str(tmp_path / "two" / "models" / "heal" / "final"),
        "teacher": "/a/teacher",
    }


def test_faults_of_files_that_nobody_foresaw() -> None:
    """Those of a file have a sentence; what names no file, or is no matter of files, may be a
    defect of ours.
    """
    for number in (errno.ENOSPC, errno.EACCES, errno.ENOTDIR, errno.EIO, errno.ESTALE):
        sentence = describe_file_error(OSError(number, os.strerror(number), "/some/file"))
        assert sentence and sentence.startswith(
            f"/some/file cannot be used ({os.strerror(number)}): check"
        )
    assert describe_file_error(OSError(errno.EIO, "I/O error")) is None
    assert describe_file_error(OSError(errno.ENOEXEC, "exec format", "/some/file")) is None


def test_a_fault_that_is_not_the_disks_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="exec") as caught, atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOEXEC, "exec format")
    assert not isinstance(caught.value, (ArtifactError, ResourceError))


@pytest.mark.parametrize(
    ("mask", "modes"),
    [
        (0o022, [0o644, 0o755, 0o644, 0o744]),
        (0o077, [0o600, 0o700, 0o600, 0o700]),
        (0o027, [0o640, 0o750, 0o640, 0o740]),
    ],
)
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
    """It is the whole process's: a checkpoint that another thread writes would be everyone's to
    change.
    """
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
    written = write_manifest(tmp_path, "preprocess", "f" * 64, info={"samples": 3})
    assert read_manifest(tmp_path) == written
    assert sorted(written.files) == ["a.txt", "sub/b.bin"]
    assert written.files["a.txt"]["bytes"] == 5
    assert written.info.pop("peak_host_bytes") > 2**20
    assert written.info == {"samples": 3}
    assert written.versions["numpy"] == np.__version__
    assert {"torch", "deepspeed", "transformers", "datasets", "rouge-score", "rapidfuzz"} <= set(
        written.versions
    )
    assert damaged_files(tmp_path, written) == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make_result(tmp_path)
    manifest = write_manifest(tmp_path, "preprocess", "f")
    (tmp_path / "a.txt").write_text("alphA")  # same size
    assert damaged_files(tmp_path, manifest) == ["a.txt has another checksum"]
    assert damaged_files(tmp_path, manifest, checksums=False) == []
    (tmp_path / "a.txt").write_text("alphas")
    assert damaged_files(tmp_path, manifest) == ["a.txt has 6 bytes instead of 5"]
    (tmp_path / "a.txt").write_text("alph")
    (tmp_path / "sub" / "b.bin").unlink()
    assert damaged_files(tmp_path, manifest) == [
        "a.txt has 4 bytes instead of 5",
        "sub/b.bin is missing",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": "x"', "is damaged (Expecting"),
        ('{"what": 1}', "is not a manifest of this program"),
        (
            json.dumps({"step": "", "fingerprint": "", "files": {}, "schema": SCHEMA + 1}),
            f"has schema {SCHEMA + 1}, this ",
        ),
    ],
)
def test_a_damaged_manifest_is_not_an_unfinished_one(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'} {words}")


def test_a_manifest_of_an_earlier_day_is_read(tmp_path: Path) -> None:
    """Finished work is found again: who changes these names counts SCHEMA up."""
    tree: dict[str, Any] = {
        "step": "data",
        "fingerprint": "f",
        "files": {"a.txt": {"bytes": 5, "sha256": "0"}},
        "info": {"samples": 3},
        "versions": {"torch": "2"},
        "schema": 1,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    assert read_manifest(tmp_path) == Manifest(
        "data", "f", tree["files"], {"samples": 3}, {"torch": "2"}, 1
    )


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": [1, 2.5, None]})
    assert read_json(tmp_path / "x.json") == {"ä": [1, 2.5, None]}
    assert (
        (tmp_path / "x.json").read_bytes().endswith(b"\n}\n")
    )  # a text, as tools of the shell want it
    with pytest.raises(ArtifactError, match="missing"):
        read_json(tmp_path / "y.json")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.text(max_size=5), plain, max_size=5))
def test_a_fingerprint_is_of_the_values_not_of_their_order(tree: dict[str, object]) -> None:
    assert fingerprint(tree) == fingerprint(dict(reversed(tree.items())))
    assert fingerprint(tree) != fingerprint({**tree, "a key that is long": 1})


def test_a_directory_has_its_name_when_its_files_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_folders_of_a_run_never_change(tmp_path: Path) -> None:
    folders = (
        "data",
        "models",
        "teacher_cache",
        "teacher_responses",
        "scores",
        "ranking",
        "plan",
        "train",
        "baseline",
        "evaluation",
        "export",
        "report",
        "cluster",
        "logs",
    )
    run = RunDirectory(str(tmp_path))
    assert (run.path, run.recipe) == (tmp_path, tmp_path / "recipe.yaml")
    assert [getattr(run, folder) for folder in folders] == [tmp_path / folder for folder in folders]


@pytest.mark.parametrize("tree", [[], {}, {"student": 3}, {"teacher": "t"}])
def test_models_without_a_student_are_damaged(tmp_path: Path, tree: Any) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ArtifactError, match=r"models\.json is missing"):
        read_models(run)
    write_json(run.models / "models.json", tree)
    with pytest.raises(
        ArtifactError, match=r"models\.json is damaged \(it names no student\): remove its folder"
    ):
        read_models(run)
    write_json(run.models / "models.json", {"student": "s", "teacher": "t"})
    assert read_models(run) == {"student": "s", "teacher": "t"}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_a_link_to_another_disk_stays_one(there: bool, tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "data", tmp_path / "run" / "data"
    real.parent.mkdir()
    link.parent.mkdir()
    if there:
        real.mkdir()
        (real / "old").write_text("x")
    link.symlink_to(real)
    with atomic_directory(link) as folder:
        (folder / "new").write_text("y")
    assert link.is_symlink() and names(real) == names(link) == ["new"]
    assert names(real.parent) == names(link.parent) == ["data"]
