"""Which shards of the scores are done. Light: every command that looks at a run asks this, most of
them without a model.
"""

from __future__ import annotations

from pathlib import Path

from pocl_ds.config import ScoreConfig
from pocl_ds.workflow.run_dir import RunDirectory, damaged_files, read_manifest

MANIFESTS = "shard-*-of-*.jsonl.manifest.json"


def shard_file(run: RunDirectory, shard: int, shards: int) -> Path:
    """Where the scores of one shard lie."""
    return run.scores / f"shard-{shard:05d}-of-{shards:05d}.jsonl"


def shard_manifest(run: RunDirectory, shard: int, shards: int) -> str:
    """Name of the manifest beside a shard's scores."""
    return shard_file(run, shard, shards).name + ".manifest.json"


def unfinished(run: RunDirectory, config: ScoreConfig, fingerprint: str) -> list[int]:
    """Shards without a whole result of this fingerprint, ascending.

    None where all samples have been scored in another division into shards: how work is cut does
    not change it.
    """
    for shards in {shards for _, shards in _sealed(run)} - {config.shards}:
        if not _unfinished(run, shards, fingerprint):
            return []
    return _unfinished(run, config.shards, fingerprint)


def whole_set(run: RunDirectory) -> str | None:
    """The fingerprint of a division all of whose shards are done; None where there is none."""
    found: dict[tuple[str, int], int] = {}
    for path, shards in _sealed(run):
        if manifest := read_manifest(run.scores, path.name):
            found[manifest.fingerprint, shards] = found.get((manifest.fingerprint, shards), 0) + 1
    return next(
        (fingerprint for (fingerprint, shards), done in found.items() if done == shards), None
    )


def discard_stale(run: RunDirectory, fingerprint: str) -> None:
    """Remove results of another fingerprint, so that no later stage takes them for current ones."""
    for path, _ in _sealed(run):
        manifest = read_manifest(run.scores, path.name)
        if manifest is not None and manifest.fingerprint != fingerprint:
            _remove(path)


def discard_other_divisions(run: RunDirectory, shards: int) -> None:
    """Remove parts of a division into another number of shards, which was given up."""
    for path, theirs in _sealed(run):
        if theirs != shards:
            _remove(path)


def _unfinished(run: RunDirectory, shards: int, fingerprint: str) -> list[int]:
    return [shard for shard in range(shards) if not _finished(run, shard, shards, fingerprint)]


def _finished(run: RunDirectory, shard: int, shards: int, fingerprint: str) -> bool:
    manifest = read_manifest(run.scores, shard_manifest(run, shard, shards))
    if manifest is None or manifest.fingerprint != fingerprint:
        return False
    return not damaged_files(run.scores, manifest, checksums=False)


def _sealed(run: RunDirectory) -> list[tuple[Path, int]]:
    """Manifests of shards, each with the number of shards of its division."""
    return [
        (path, int(path.name.split(".")[0].rpartition("-")[2]))
        for path in sorted(run.scores.glob(MANIFESTS))
    ]


def _remove(manifest: Path) -> None:
    manifest.unlink(missing_ok=True)  # first: scores without a manifest are nobody's
    manifest.with_name(manifest.name.removesuffix(".manifest.json")).unlink(missing_ok=True)
