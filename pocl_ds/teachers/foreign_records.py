"""Importing teacher caches from the files of other programs, and saying what those lack that cannot
be imported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_ds.config import TeacherCacheConfig
from pocl_ds.errors import ArtifactError
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.teachers.cache_format import METADATA
from pocl_ds.teachers.cache_import import ImportedCache, write_imported
from pocl_ds.teachers.cache_shard import STEP
from pocl_ds.teachers.cache_step import CacheLayout
from pocl_ds.teachers.distillkit_capture import CONFIG, DistillKitCapture
from pocl_ds.workflow.manifest import finished_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

REFILL = "fill the cache with `pocl cache-teacher`"


def is_foreign(source: Path) -> bool:
    """Whether something else than an exported cache is in a folder, or in a file."""
    return not (source / METADATA).is_file()


def import_foreign(
    run: RunDirectory,
    source: Path,
    layout: CacheLayout,
    *,
    config: TeacherCacheConfig,
    fingerprint: str,
) -> None:
    """Write teacher_cache/ from a capture of DistillKit; nothing if the step is finished.

    fingerprint: of the step. Raises ArtifactError if the files are not exact, are damaged, or do
    not belong to the recipe and its data.
    """
    if finished_manifest(run.teacher_cache, fingerprint):
        log.info("%s: %s is finished already", STEP, run.teacher_cache)
        return
    if not (source / CONFIG).is_file():
        raise _unknown_format(source)
    codec = layout.codec
    if not isinstance(codec, TopKCodec):
        raise ArtifactError(
            f"{source} has the largest log-probabilities of a teacher, and this recipe has "
            f"teacher.mode={layout.mode}: set teacher.mode=cached_topk, or {REFILL}"
        )
    if codec.temperatures != (1.0,):
        needed = ", ".join(f"{value:g}" for value in codec.temperatures if value != 1)
        raise ArtifactError(
            f"{source} has log-probabilities at temperature 1 alone, from which the mass of the "
            f"other ids at temperature {needed} does not follow: set curriculum.temperature to "
            f"[1, 1] and baseline.temperature to 1, or {REFILL}"
        )
    if len(layout.caches) > 1 or layout.vocab.teacher_ids is not None:
        raise ArtifactError(
            f"{source} has the ids of one teacher, and this recipe has several teachers or other "
            f"ids in the teacher's tokenizer: {REFILL}"
        )
    log.warning(
        "%s: the files of a DistillKit capture name neither teacher nor tokenizer: those in %s are "
        "taken for those of %s",
        STEP,
        source,
        layout.caches[0].model.label,
    )
    capture = DistillKitCapture(source, codec, layout.vocab.allowed)
    imported = ImportedCache(capture, codec, lambda: _describe(capture, codec))
    write_imported(run, source, layout, [imported], config, fingerprint)
    if capture.filled_tokens:
        log.warning(
            "%s: %s: %d tokens have fewer than %d stored ids that the student shares; further ids "
            "have an even share of the rest",
            STEP,
            source,
            capture.filled_tokens,
            codec.k,
        )
    log.info("%s: the top %d leave out a probability of %.4f", STEP, codec.k, capture.mean_mass())


def _describe(capture: DistillKitCapture, codec: TopKCodec) -> dict[str, object]:
    return {
        "mode": codec.mode,
        "backend": "distillkit",
        "codec": vars(codec),
        "error": [{"temperature": 1.0, "mass": capture.mean_mass()}],
        "filled_tokens": capture.filled_tokens,
    }


def _unknown_format(source: Path) -> ArtifactError:
    """The error for a folder or a file that cannot be imported, with the reason for those of
    axolotl's KD plug-in.
    """
    for path, columns in _tables(source):
        if {"target_logprobs", "input_ids"} <= columns:
            return ArtifactError(
                f"{path} is prepared for axolotl's KD plug-in, which makes the stored ids' "
                f"probabilities sum to 1, so that the mass of all other ids is lost: {REFILL}"
            )
        if "target_token_ids" in columns or any("logprobs" in name for name in columns):
            return ArtifactError(
                f"{path} is a dataset for axolotl's KD plug-in, with log-probabilities and without "
                "the samples' token ids, so that nothing shows to which positions they belong: "
                f"{REFILL}"
            )
    return ArtifactError(
        f"{source} holds neither {METADATA}, which completes an exported teacher cache, nor "
        f"{CONFIG} of a DistillKit capture: check the path, or export again with `pocl "
        "cache-teacher --export`"
    )


def _tables(source: Path) -> Iterator[tuple[Path, set[str]]]:
    """The first file of each kind of table in a folder, with the names of its columns."""
    for pattern in ("*.parquet", "*.arrow", "*.jsonl", "*.json"):
        paths = [source] if source.match(pattern) else sorted(source.glob(f"**/{pattern}"))
        for path in paths[:1]:
            try:
                yield path, _columns(path)
            except (OSError, ValueError, pa.ArrowException):
                continue


def _columns(path: Path) -> set[str]:
    if path.suffix == ".parquet":
        return set(pq.read_schema(path).names)
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as stream:
            return set(pa.ipc.open_stream(stream).schema.names)
    with path.open(encoding="utf-8") as stream:
        record = json.loads(stream.readline())
    return set(record) if isinstance(record, dict) else set()
