"""Files that appear complete or not at all, and errors of disks as one sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from pocl_ds.errors import ArtifactError, PoclError, ResourceError

# errno values by what the user has to do about them.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
NAME_CONFLICT = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# A disk, a mount, or a Lustre server that evicted its client.
DISK_LOST = (errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.EREMOTEIO)
# Another process changes the folder, or something was mounted there.
CONCURRENT_CHANGE = (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY, errno.EXDEV)
# How libraries that drop the errno report a full disk: safetensors, tokenizers, torch, numpy,
# shutil.
DISK_FULL_MESSAGE = re.compile(
    r"No space left|[Dd]isk quota exceeded|os error (28|122)|PytorchStreamWriter failed|"
    r"iostream error|file write failed|unexpected pos|requested and \d+ written"
)

# What `_temporary_name` returns.
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{16}")
# An empty file in each directory that `atomic_directory` has written, which it may replace.
MARK = ".pocl_ds"


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of any library means that the disk is full."""
    return getattr(error, "errno", None) in DISK_FULL or bool(DISK_FULL_MESSAGE.search(str(error)))


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into one sentence that names it and what to do.

    Raises ResourceError for a full disk or an exceeded quota; ArtifactError for a missing
    permission, a file in the way, or a disk that is gone. Other errors pass through.
    """
    try:
        yield
    except PoclError:
        raise
    except OSError as error:
        # Errors with a known errno, by what the user has to do.
        if error.errno in DISK_FULL:
            raise ResourceError(
                f"the disk is full while writing {path}: free some space and run the same command "
                "again; finished work is saved"
            ) from error
        if error.errno in NO_PERMISSION:
            raise ArtifactError(
                f"{path} cannot be written ({error.strerror}): choose another --run-dir or change "
                "its permissions"
            ) from error
        if error.errno in NAME_CONFLICT:
            raise ArtifactError(
                f"{path} cannot be written ({error.strerror}: {error.filename}): choose another "
                "--run-dir or move the file that is in the way"
            ) from error
        # A missing file elsewhere, such as a model, is not an error of this folder.
        inside = error.filename is None or os.fsdecode(error.filename).startswith(str(path.parent))
        if error.errno in DISK_LOST or (error.errno in CONCURRENT_CHANGE and inside):
            raise ArtifactError(
                f"{path} could not be written ({error.strerror}): check its disk or mount, and "
                "whether another process changes the folder, then run the same command again"
            ) from error
        _raise_if_disk_full(path, error)
        raise
    except Exception as error:  # libraries that hide the errno
        _raise_if_disk_full(path, error)
        raise


def _raise_if_disk_full(path: Path, error: Exception) -> None:
    if disk_is_full(error):
        message = " ".join(str(error).split())[:200]
        raise ResourceError(
            f"the disk is full while writing {path} ({message}): free some space and run the same "
            "command again; finished work is saved"
        ) from error


def describe_file_error(error: OSError) -> str | None:
    """A sentence for a file error that no other code has explained, or None for an error that may
    be a bug of this program.
    """
    # An open file has no name any more; most often it is stdout.
    if error.filename is None and error.errno in DISK_FULL:
        return (
            f"the disk of an output is full ({error.strerror}): free some space and run the same "
            "command again; finished work is saved"
        )
    explained = (*DISK_FULL, *NO_PERMISSION, *NAME_CONFLICT, errno.EIO, errno.ESTALE)
    if error.filename is None or error.errno not in explained:
        return None
    return (
        f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): check its name, its "
        "permissions and its disk"
    )


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` once the block has ended without an error and the
    data is on disk.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(path)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # the umask applies
        try:
            encoding = None if "b" in mode else "utf-8"
            with os.fdopen(handle, mode, encoding=encoding) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        fsync_path(path.parent)


@contextlib.contextmanager
def create_file(path: Path) -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` once the block has ended without an error and the
    data is on disk, unless another process has created it meanwhile.
    """
    temporary = _temporary_name(path)
    try:
        with atomic_write(temporary, "wb") as stream:
            yield stream
        with explain_disk_errors(path), contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path` once the block has ended without an error
    and its files are on disk.

    A link may stand for a new or empty directory. Raises ArtifactError if there are files that
    this function did not write: behind a link, or in a directory without its mark.
    """
    target = Path(os.path.realpath(path))
    with explain_disk_errors(target):
        _check_replaceable(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(target)
        temporary.mkdir()
        try:
            yield temporary

            # Files get the directory's read permissions: safetensors writes private ones.
            (temporary / MARK).touch()
            allowed = temporary.stat().st_mode
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    os.chmod(file, (file.stat().st_mode & 0o100 | 0o666) & allowed)
                    fsync_path(file)

            # Swap the directories. Another process may have removed the old one in between.
            _check_replaceable(path)
            old = _temporary_name(target)
            if target.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    os.rename(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(target.parent)


def make_replaceable(path: Path) -> None:
    """Make a directory that a later `atomic_directory` may replace, if there is none."""
    with explain_disk_errors(path), contextlib.suppress(FileExistsError):
        path.mkdir()
        (path / MARK).touch()


def _check_replaceable(path: Path) -> None:
    """Raise ArtifactError for a directory whose files are not this program's to remove."""
    if not path.is_dir() or not any(path.iterdir()):
        return
    if path.is_symlink():
        raise ArtifactError(
            f"{path} is a link to {os.path.realpath(path)}, which holds files: nothing is removed "
            "through a link; remove the link, or let it name an empty folder"
        )
    if not (path / MARK).is_file():
        raise ArtifactError(
            f"{path} holds files and is no folder that pocl_ds has written: move it away, or "
            "choose another folder"
        )


def remove_partial_directories(path: Path) -> None:
    """Remove the temporary directories of processes that were killed inside
    `atomic_directory(path)`. The caller makes sure that no other process is writing `path`.
    """
    for partial in path.parent.glob(f".{path.name}.*"):
        if TEMPORARY_NAME.fullmatch(partial.name):
            _remove(partial)


def remove_leftovers(folder: Path) -> int:
    """Remove the temporary files and directories of killed processes in a folder and below it.
    The caller makes sure that no other process is writing there. Returns their number. Links are
    not followed.
    """
    count = 0
    for parent, directories, files in os.walk(folder):
        for name in [*directories, *files]:
            if TEMPORARY_NAME.fullmatch(name):
                _remove(Path(parent) / name)
                count += 1
        directories[:] = [name for name in directories if not TEMPORARY_NAME.fullmatch(name)]
    return count


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _temporary_name(path: Path) -> Path:
    """An unpredictable name in the same folder. Files there get their mode from the system: to read
    the umask one has to set it, and another thread's file would be world-writable in between.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def fsync_path(path: Path) -> None:
    """Flush a file's data, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_array(stream: IO[bytes], array: Any) -> None:
    """Write a numpy array as .npy. Given a real file, numpy bypasses `stream.write` and misses a
    full disk, or raises an OSError without an errno; the wrapper prevents that.
    """
    import numpy as np

    np.save(SimpleNamespace(write=stream.write), array)


def write_json(path: Path, value: Any) -> None:
    """Write a tree of plain values, atomically."""
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False, default=list)
        stream.write("\n")


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote. Raises ArtifactError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run the step that writes it") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ArtifactError(
            f"{path} is damaged ({error}): remove it and run its step again"
        ) from None


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
