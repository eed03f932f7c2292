"""Copies of files on the local disk of a node.

One process of a node copies the files whose size or checksum differs, so that an interrupted copy
continues and a complete one is used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.runtime.formatting import format_size
from pocl_ds.workflow.files import atomic_write, explain_disk_errors, file_digest
from pocl_ds.workflow.locks import LockTakenError, hold_lock

log = logging.getLogger("pocl_ds")

BLOCK_BYTES = 1 << 22


def expand_folder(folder: str, field: str) -> Path:
    """The folder that a field of the recipe names on this node. Raises RecipeError for a variable
    that is not set, or a path that is not absolute.
    """
    path = os.path.expanduser(os.path.expandvars(folder))
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise RecipeError(
            f"{field}={folder}: {unset[0]} is not set on {socket.gethostname()}: set it there, or "
            "name a folder"
        )
    if not os.path.isabs(path):
        raise RecipeError(
            f"{field}={folder} is not an absolute path: name a folder on the local disk of each "
            "node, as in /scratch/me or $TMPDIR"
        )
    return Path(path)


def copy_files(
    directory: Path,
    files: Mapping[str, Mapping[str, Any]],
    target: Path,
    *,
    name: str,
    field: str,
    remedy: str,
) -> None:
    """Copy files of a directory, as far as `target` does not have them. Several processes of a
    node may call it at once.

    files: size and checksum by name. name: what they are, for the log. field: of the recipe, for
    messages. remedy: what to do about a damaged file. Raises ResourceError if the disk is too
    small, ArtifactError if a file is damaged.
    """
    start = time.monotonic()
    with explain_disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        with hold_lock(target / ".lock", fcntl.LOCK_EX):
            # Files of copies that were interrupted.
            for path in target.rglob(".*.*"):
                path.unlink()
            missing = {
                name: entry
                for name, entry in files.items()
                if not (target / name).is_file() or file_digest(target / name) != entry
            }
            _check_space(directory, target, sum(e["bytes"] for e in missing.values()), field)
            for file, entry in missing.items():
                (target / file).parent.mkdir(exist_ok=True)
                _copy_file(directory / file, target / file, entry, remedy)
    log.info(
        "%s: copied %s of %s to %s in %.0f s",
        name,
        format_size(sum(entry["bytes"] for entry in missing.values())),
        format_size(sum(entry["bytes"] for entry in files.values())),
        target,
        time.monotonic() - start,
    )


@contextlib.contextmanager
def hold_copy(target: Path) -> Iterator[None]:
    """Use a copy within the block. The last process of the node that leaves the block removes it;
    after a process was killed, that is one of the next that use the copy.
    """
    lock = target.with_name(f".{target.name}.readers")
    with explain_disk_errors(lock):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(lock, fcntl.LOCK_SH):
            yield
    finally:
        with (
            contextlib.suppress(LockTakenError, ResourceError, OSError),
            hold_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            shutil.rmtree(target)
            lock.unlink()


def _check_space(directory: Path, target: Path, missing_bytes: int, field: str) -> None:
    state = os.statvfs(target)
    free = state.f_bavail * state.f_frsize
    if missing_bytes > free:
        raise ResourceError(
            f"{field}: {target} on {socket.gethostname()} has {format_size(free)} free, and "
            f"{directory} needs {format_size(missing_bytes)} more: name a larger disk, or set it "
            "to null, so that training reads the shared file system"
        )


def _copy_file(source: Path, target: Path, expected: Mapping[str, Any], remedy: str) -> None:
    """Copy a file, and compare its checksum on the way."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as stream, atomic_write(target, "wb") as copy:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            copy.write(block)
        if {"bytes": size, "sha256": digest.hexdigest()} != dict(expected):
            raise ArtifactError(f"{source} is damaged (its checksum differs): {remedy}")
