"""Which shards of the scores are finished. Imports nothing heavy, since most commands use it."""

from __future__ import annotations

from pathlib import Path

from pocl_ds.config import ScoreConfig
from pocl_ds.workflow.manifest import damaged_files, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

MANIFEST_PATTERN = "shard-*-of-*.jsonl.manifest.json"


def shard_file(run: RunDirectory, shard: int, shards: int) -> Path:
    """The score file of one shard."""
    return run.scores / f"shard-{shard:05d}-of-{shards:05d}.jsonl"


def shard_manifest(run: RunDirectory, shard: int, shards: int) -> str:
    """The name of a shard's manifest, in the folder of its score file."""
    return shard_file(run, shard, shards).name + ".manifest.json"


def unfinished_shards(run: RunDirectory, config: ScoreConfig, fingerprint: str) -> list[int]:
    """Shards without a complete result of this fingerprint, ascending.

    Empty if all samples were scored in a division into another number of shards, since the
    division does not change the scores.
    """
    divisions = {shards for _, shards in _shard_manifests(run)} - {config.shards}
    if any(not _unfinished(run, shards, fingerprint) for shards in divisions):
        return []
    return _unfinished(run, config.shards, fingerprint)


def fingerprint_of_finished_scores(run: RunDirectory) -> str | None:
    """The fingerprint of a division whose shards are all finished; None if there is none."""
    finished: dict[tuple[str, int], int] = {}
    for path, shards in _shard_manifests(run):
        if manifest := read_manifest(run.scores, path.name):
            division = manifest.fingerprint, shards
            finished[division] = finished.get(division, 0) + 1
    return next(
        (fingerprint for (fingerprint, shards), count in finished.items() if count == shards), None
    )


def discard_stale(run: RunDirectory, fingerprint: str) -> None:
    """Remove results of another fingerprint, so that no later step uses them."""
    for path, _ in _shard_manifests(run):
        manifest = read_manifest(run.scores, path.name)
        if manifest is not None and manifest.fingerprint != fingerprint:
            _remove(path)


def discard_other_divisions(run: RunDirectory, shards: int) -> None:
    """Remove shards of divisions into another number of shards."""
    for path, number in _shard_manifests(run):
        if number != shards:
            _remove(path)


def _unfinished(run: RunDirectory, shards: int, fingerprint: str) -> list[int]:
    return [shard for shard in range(shards) if not _is_finished(run, shard, shards, fingerprint)]


def _is_finished(run: RunDirectory, shard: int, shards: int, fingerprint: str) -> bool:
    manifest = read_manifest(run.scores, shard_manifest(run, shard, shards))
    if manifest is None or manifest.fingerprint != fingerprint:
        return False
    return not damaged_files(run.scores, manifest, checksums=False)


def _shard_manifests(run: RunDirectory) -> list[tuple[Path, int]]:
    """Manifests of shards, each with the number of shards of its division."""
    return [
        (path, int(path.name.split(".")[0].rpartition("-")[2]))
        for path in sorted(run.scores.glob(MANIFEST_PATTERN))
    ]


def _remove(manifest: Path) -> None:
    """Remove a manifest, then its score file: without a manifest the file does not count."""
    manifest.unlink(missing_ok=True)
    manifest.with_name(manifest.name.removesuffix(".manifest.json")).unlink(missing_ok=True)
