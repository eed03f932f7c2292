"""Which shards of the scores are finished. Imports nothing heavy, since most commands use it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pocl_ds.config import ScoreConfig
from pocl_ds.workflow.manifest import (
    VERIFIED,
    DamagedManifestError,
    Manifest,
    finished_manifest,
    read_manifest,
)
from pocl_ds.workflow.run_dir import RunDirectory

MANIFEST_PATTERN = "shard-*-of-*.jsonl.manifest.json"


def shard_file(run: RunDirectory, shard: int, shards: int) -> Path:
    """The score file of one shard."""
    return run.scores / f"shard-{shard:05d}-of-{shards:05d}.jsonl"


def shard_manifest(run: RunDirectory, shard: int, shards: int) -> str:
    """The name of a shard's manifest, in the folder of its score file."""
    return shard_file(run, shard, shards).name + ".manifest.json"


def unfinished_shards(
    run: RunDirectory, config: ScoreConfig, fingerprint: str, *, checksums: bool = True
) -> list[int]:
    """Shards without a complete result of this fingerprint, ascending.

    Empty if all samples were scored in a division into another number of shards, since the
    division does not change the scores. checksums: False compares only the sizes of the files.
    """

    def unfinished(shards: int) -> list[int]:
        return [
            shard
            for shard in range(shards)
            if not _is_finished(run, shard, shards, fingerprint, checksums)
        ]

    divisions = {shards for _, shards in _shard_manifests(run)} - {config.shards}
    if any(not unfinished(shards) for shards in divisions):
        return []
    return unfinished(config.shards)


def fingerprint_of_finished_scores(run: RunDirectory) -> str | None:
    """The fingerprint of a division whose shards are all finished; None if there is none."""
    finished: dict[tuple[str, int], int] = {}
    for path, shards in _shard_manifests(run):
        if manifest := _readable_manifest(path):
            division = manifest.fingerprint, shards
            finished[division] = finished.get(division, 0) + 1
    return next(
        (fingerprint for (fingerprint, shards), count in finished.items() if count == shards), None
    )


def discard_stale(run: RunDirectory, fingerprint: str) -> None:
    """Remove results of another fingerprint, and those whose manifest is damaged, so that no later
    step uses them.
    """
    for path, _ in _shard_manifests(run):
        manifest = _readable_manifest(path)
        if manifest is None or manifest.fingerprint != fingerprint:
            _remove(path)


def discard_other_divisions(run: RunDirectory, shards: int) -> None:
    """Remove shards of divisions into another number of shards."""
    for path, number in _shard_manifests(run):
        if number != shards:
            _remove(path)


def _is_finished(
    run: RunDirectory, shard: int, shards: int, fingerprint: str, checksums: bool
) -> bool:
    path = run.scores / shard_manifest(run, shard, shards)
    manifest = _readable_manifest(path)
    return manifest is not None and (
        finished_manifest(run.scores, fingerprint, name=path.name, checksums=checksums) is not None
    )


def _readable_manifest(path: Path) -> Manifest | None:
    """A shard's manifest; None if it is damaged, which leaves the shard unfinished."""
    with contextlib.suppress(DamagedManifestError):
        return read_manifest(path.parent, path.name)
    return None


def _shard_manifests(run: RunDirectory) -> list[tuple[Path, int]]:
    """Manifests of shards, each with the number of shards of its division."""
    return [
        (path, int(path.name.split(".")[0].rpartition("-")[2]))
        for path in sorted(run.scores.glob(MANIFEST_PATTERN))
    ]


def _remove(manifest: Path) -> None:
    """Remove a manifest, then its score file: without a manifest the file does not count."""
    manifest.unlink(missing_ok=True)
    manifest.with_name(f".{manifest.name}{VERIFIED}").unlink(missing_ok=True)
    manifest.with_name(manifest.name.removesuffix(".manifest.json")).unlink(missing_ok=True)
