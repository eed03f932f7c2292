"""Files appear complete or not at all, and errors of disks name the path and a remedy."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT

from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.workflow.files import (
    MARK,
    atomic_directory,
    atomic_write,
    describe_file_error,
    explain_disk_errors,
    read_json,
    remove_leftovers,
    remove_partial_directories,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MARK)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write_replaces_a_file(tmp_path: Path) -> None:
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
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(fault), atomic_write(target) as stream:
        stream.write("new")
        raise fault
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_error_is_raised_if_the_temporary_file_was_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the fault"), atomic_write(tmp_path / "file"):
        (tmp_path / names(tmp_path)[0]).unlink()
        raise RuntimeError("the fault")


def test_data_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is bytes, name, directory entry; no file handle stays open."""
    happened: list[Any] = []
    sync, replace = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        happened.append(path if path.is_dir() else path.read_text())
        sync(handle)

    def record_replace(source: Path, target: Path) -> None:
        replace(source, target)
        happened.append(target.name)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    opened = len(os.listdir("/proc/self/fd"))
    with atomic_write(tmp_path / "file") as stream:
        stream.write("text")
    assert happened == ["text", "file", tmp_path]
    with atomic_directory(tmp_path / "far" / "below" / "folder"):
        happened.clear()
    assert happened == ["", "folder", tmp_path / "far" / "below"]  # its mark is an empty file
    assert len(os.listdir("/proc/self/fd")) == opened


def test_text_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pocl_ds.workflow import files\n"
        "path = Path(sys.argv[1])\n"
        "files.write_json(path, {'x': chr(228)})\n"
        "assert files.read_json(path) == {'x': chr(228)}"
    )
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


LOST_REMEDY = (
    "check its disk or mount, and whether another process changes the folder, then run the same "
    "command again"
)


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (
            errno.EDQUOT,
            ResourceError,
            "free some space and run the same command again; finished work is saved",
        ),
        (errno.EACCES, ArtifactError, "choose another --run-dir or change its permissions"),
        (errno.EROFS, ArtifactError, "choose another --run-dir or change its permissions"),
        (
            errno.ENOTDIR,
            ArtifactError,
            "choose another --run-dir or move the file that is in the way",
        ),
        *(
            (number, ArtifactError, LOST_REMEDY)
            for number in (errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.ENOTEMPTY)
        ),
    ],
)
@pytest.mark.parametrize("build", [atomic_write, atomic_directory])
def test_other_disk_errors_name_a_remedy(
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
def test_a_full_disk_is_recognized_in_messages_of_libraries(
    error: Exception, tmp_path: Path
) -> None:
    """Some libraries drop the errno."""
    with (
        pytest.raises(
            ResourceError, match=r"the disk is full while writing .*/file \(.*\): free some space"
        ),
        explain_disk_errors(tmp_path / "file"),
    ):
        raise error


def test_errors_of_other_paths_pass_through(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/model"),
        ArtifactError("No space left, we said"),
    ):
        with pytest.raises(type(error)) as caught, explain_disk_errors(tmp_path / "file"):
            raise error
        assert caught.value is error


def test_a_folder_removed_during_a_write_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="could not be written .No such file"),
        atomic_write(tmp_path / "below" / "file"),
    ):
        shutil.rmtree(tmp_path / "below")


def test_two_writers_of_one_directory_do_not_stop_each_other(tmp_path: Path) -> None:
    """The directory of the writer that finishes last stays."""
    with atomic_directory(tmp_path / "made") as outer:
        (outer / "of").write_text("outer")
        with atomic_directory(tmp_path / "made") as inner:
            (inner / "of").write_text("inner")
    assert (tmp_path / "made" / "of").read_text() == "outer" and names(tmp_path) == ["made"]
    with (
        pytest.raises(ArtifactError, match="move the file that is in the way"),
        atomic_directory(tmp_path / "made" / "of"),
    ):
        pass
    assert (tmp_path / "made" / "of").read_text() == "outer"


def test_partial_directories_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".final.0123456789abcdef", ".final.notours", ".other.0123456789abcdef", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    remove_partial_directories(tmp_path / "final")
    assert names(tmp_path) == [".final.notours", ".other.0123456789abcdef", "final"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Each may be a whole model."""
    hexadecimal = "0123456789abcdef"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f".final.{hexadecimal}" / "below").mkdir(parents=True)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / f".shard.jsonl.{hexadecimal}").touch()
    (tmp_path / "elsewhere" / f".x.{hexadecimal}").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / f".y.{hexadecimal}").symlink_to(tmp_path / "elsewhere")
    for name in (".final.0123", f"final.{hexadecimal}", f".final.{hexadecimal}0", ".lock"):
        (tmp_path / "run" / name).touch()
    assert remove_leftovers(tmp_path / "run") == 1
    assert names(tmp_path / "elsewhere") == [f".x.{hexadecimal}"]
    assert remove_leftovers(tmp_path) == 3
    assert names(tmp_path / "train") == names(tmp_path / "scores") == []
    assert len(names(tmp_path / "run")) == 5


def test_an_unexplained_file_error_becomes_a_sentence() -> None:
    """An error that names no file, or that no disk causes, may be a bug: it gets no sentence."""
    for number in (errno.ENOSPC, errno.EACCES, errno.ENOTDIR, errno.EIO, errno.ESTALE):
        sentence = describe_file_error(OSError(number, os.strerror(number), "/some/file"))
        assert sentence and sentence.startswith(
            f"/some/file cannot be used ({os.strerror(number)}): check"
        )
    assert describe_file_error(OSError(errno.EIO, "I/O error")) is None
    assert describe_file_error(OSError(errno.ENOEXEC, "exec format", "/some/file")) is None


def test_an_error_that_is_not_of_the_disk_passes_through(tmp_path: Path) -> None:
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
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int, modes: list[int]) -> None:
    """Also for files whose writer is stricter, such as safetensors."""
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


def test_the_umask_of_the_process_is_never_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask belongs to the process: a checkpoint that another thread writes at that moment
    would be world-writable.
    """
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    write_json(tmp_path / "file", {})
    with atomic_directory(tmp_path / "final") as folder:
        (folder / "x").touch()


def test_atomic_directory_replaces_a_directory(tmp_path: Path) -> None:
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


def test_a_full_disk_removes_the_partial_directory(tmp_path: Path) -> None:
    with pytest.raises(ResourceError), atomic_directory(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
        full_disk()
    assert names(tmp_path) == []


def test_json_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": [1, 2.5, None]})
    assert read_json(tmp_path / "x.json") == {"ä": [1, 2.5, None]}
    # Shell tools expect a newline at the end.
    assert (tmp_path / "x.json").read_bytes().endswith(b"\n}\n")
    with pytest.raises(ArtifactError, match="missing"):
        read_json(tmp_path / "y.json")


def test_files_are_on_disk_before_their_directory_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    sync, rename = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        written.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def record_replace(source: Path, target: Path) -> None:
        written.append("named")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_directory(tmp_path / "made") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "one").write_text("1")
        (folder / "two").write_text("2")
    assert (
        set(written[: written.index("named")]) == {MARK, "one", "two"}
        and written[-1] == tmp_path.name
    )


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_links_to_another_disk_stays_a_link(exists: bool, tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "data", tmp_path / "run" / "data"
    real.parent.mkdir()
    link.parent.mkdir()
    if exists:
        real.mkdir()
    link.symlink_to(real)
    with atomic_directory(link) as folder:
        (folder / "new").touch()
    assert link.is_symlink() and names(real) == names(link) == ["new"]


@pytest.mark.parametrize("own", [True, False])
def test_nothing_is_removed_through_a_link(own: bool, tmp_path: Path) -> None:
    """A link at train/final had the files of somebody else deleted."""
    real, link = tmp_path / "theirs", tmp_path / "final"
    if own:
        with atomic_directory(real) as folder:
            (folder / "weights").touch()
    else:
        real.mkdir()
        (real / "weights").touch()
    link.symlink_to(real)
    with (
        pytest.raises(
            ArtifactError, match=f"final is a link to {real}, which holds files: nothing"
        ),
        atomic_directory(link),
    ):
        raise AssertionError("refused before anything is written")
    assert names(real) == ["weights"] and names(tmp_path) == ["final", "theirs"]


def test_a_folder_of_another_program_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "thesis.tex").touch()
    with (
        pytest.raises(ArtifactError, match="final holds files and is no folder that pocl_ds has"),
        atomic_directory(target),
    ):
        raise AssertionError("refused before anything is written")
    (target / "thesis.tex").unlink()
    with pytest.raises(ArtifactError, match="holds files"), atomic_directory(target) as folder:
        (folder / "weights").touch()
        (target / "late").touch()  # it came while the result was computed
    assert names(target) == ["late"] and names(tmp_path) == ["final"]
