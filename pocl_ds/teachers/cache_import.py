"""`pocl cache-teacher --import`: fill the teacher cache of a run from an exported one, as if the
teacher had run here.

What does not belong to the recipe and its data is refused before anything is written: another
tokenizer, template, teacher or storage, temperatures that records lack, and missing samples. Then
the folder of each teacher appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pocl_ds.config import TeacherCacheConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.teachers.cache import write_rows
from pocl_ds.teachers.cache_format import (
    CacheMetadata,
    DataIdentity,
    ExportedOutputs,
    ExportedTeacher,
    ModelIdentity,
    read_metadata,
    verify_files,
    vocabulary_identity,
)
from pocl_ds.teachers.cache_plan import PlannedCache, prepare_caches
from pocl_ds.teachers.cache_shard import STEP, CacheShard
from pocl_ds.teachers.cache_step import CacheLayout, finish_cache, finish_step, plan_shards
from pocl_ds.teachers.cache_writer import check_size
from pocl_ds.teachers.quantized_states import FILE as CHANNELS
from pocl_ds.workflow.files import (
    atomic_directory,
    explain_disk_errors,
    remove_partial_directories,
)
from pocl_ds.workflow.manifest import finished_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

REFILL = "or fill the cache here with `pocl cache-teacher`"


class OutputSource(Protocol):
    """Outputs of one teacher that were made elsewhere."""

    def find(self, split: TokenizedSplit, row: int) -> Any:
        """Where the outputs of a sample are, for `read`; None if there are none. In ascending order
        of places the source reads its files from front to back.
        """

    def read(self, place: Any) -> Tensor:
        """The outputs as the cache stores them: [loss tokens, width]."""


@dataclass(frozen=True)
class ImportedCache:
    """What to write into the cache of one teacher. codec: of the records, None for hidden states.
    describe: what its manifest records, after all outputs are read. copy_files: writes its other
    files into a folder.
    """

    outputs: OutputSource
    codec: RecordCodec | None
    describe: Callable[[], dict[str, Any]]
    copy_files: Callable[[Path], None] = lambda _folder: None


def import_cache(
    run: RunDirectory,
    source: Path,
    layout: CacheLayout,
    *,
    config: TeacherCacheConfig,
    fingerprint: str,
    data: DataIdentity,
    models: Mapping[str, ModelIdentity],
) -> None:
    """Write teacher_cache/ from the exported cache in the folder `source`; nothing if the step is
    finished.

    fingerprint: of the step. models: of each teacher, by its field. Raises ArtifactError if the
    export is damaged or does not belong to the recipe and its data, ResourceError for a full disk.
    """
    if finished_manifest(run.teacher_cache, fingerprint):
        log.info("%s: %s is finished already", STEP, run.teacher_cache)
        return
    metadata = read_metadata(source)
    _check_identity(source, metadata, layout, config, data)
    teachers = [
        _find_teacher(source, metadata, models[cache.model.fields[0]]) for cache in layout.caches
    ]
    for cache, teacher in zip(layout.caches, teachers, strict=True):
        _check_states(source, cache, teacher, metadata)
    verify_files(source, metadata)
    imported = [_imported_cache(source, metadata, teacher) for teacher in teachers]
    write_imported(run, source, layout, imported, config, fingerprint)


def write_imported(
    run: RunDirectory,
    source: Path,
    layout: CacheLayout,
    imported: Sequence[ImportedCache],
    config: TeacherCacheConfig,
    fingerprint: str,
) -> None:
    """Write the cache of each teacher, and the manifest of the step. imported: of each of the
    layout's caches. Raises ArtifactError if a sample is missing.
    """
    # Find all samples before anything is written.
    places = [
        _find_samples(source, cache, layout.splits, own.outputs)
        for cache, own in zip(layout.caches, imported, strict=True)
    ]
    shards = [
        plan_shards(cache, layout.splits, config, own.codec)
        for cache, own in zip(layout.caches, imported, strict=True)
    ]
    check_size([shard for own in shards for shard in own], config.max_disk_gb)

    # Write one folder after the other. Those of an import that was killed are removed.
    prepare_caches(run, layout.caches)
    for cache, own_shards, own, own_places in zip(
        layout.caches, shards, imported, places, strict=True
    ):
        if cache.is_finished:
            continue
        remove_partial_directories(cache.directory)
        with atomic_directory(cache.directory) as folder:
            target = replace(cache, directory=folder)
            moved = [replace(shard, directory=folder) for shard in own_shards]
            for split, rows in cache.rows.items():
                write_rows(folder, split, rows)
            own.copy_files(folder)
            _write_shards(moved, own_places, own.outputs, cache.fingerprint)
            finish_cache(target, moved, own.codec, own.describe())
    finish_step(run, layout.caches, layout.mode, fingerprint)
    log.info("%s: imported %s", STEP, source)


def _check_identity(
    source: Path,
    metadata: CacheMetadata,
    layout: CacheLayout,
    config: TeacherCacheConfig,
    data: DataIdentity,
) -> None:
    """Raise ArtifactError that names the first thing in which an export differs from the recipe:
    tokenizer, template, what is stored, backend, vocabulary, or temperatures.
    """
    # Token ids mean the same only with the same tokenizer and template.
    other = metadata.data.tokenizer
    changed = [part for part in data.tokenizer if other.get(part) != data.tokenizer[part]]
    if changed:
        raise ArtifactError(
            f"{source} was made with another tokenizer of the student (different: "
            f"{', '.join(changed)}): use that tokenizer, {REFILL}"
        )
    if metadata.data.template != data.template:
        name, source_name = data.template["name"], metadata.data.template.get("name")
        difference = (
            f"template {source_name}, and this recipe has {name}"
            if source_name != name
            else f"other contents or settings of the template {name}"
        )
        raise ArtifactError(f"{source} has {difference}: use the same section `prompt`, {REFILL}")

    # What is stored.
    if metadata.mode != layout.mode:
        raise ArtifactError(
            f"{source} has teacher.mode={metadata.mode}, and this recipe {layout.mode}: set "
            f"teacher.mode={metadata.mode}, {REFILL}"
        )
    if metadata.backend != config.backend:
        raise ArtifactError(
            f"{source} was filled by teacher_cache.backend={metadata.backend}, which rounds "
            f"otherwise than {config.backend}: set teacher_cache.backend={metadata.backend}, "
            f"{REFILL}"
        )
    codec = metadata.read_codec()
    if codec is None:
        if metadata.hidden_dtype != config.hidden_dtype:
            raise ArtifactError(
                f"{source} has teacher_cache.hidden_dtype={metadata.hidden_dtype}, and this recipe "
                f"{config.hidden_dtype}: set it to {metadata.hidden_dtype}, {REFILL}"
            )
        return
    assert layout.codec is not None
    if vocabulary_identity(layout.vocab) != metadata.vocabulary:
        raise ArtifactError(
            f"{source} has records over another vocabulary ({metadata.vocabulary['size']} ids, and "
            f"here teacher and student share {int(layout.vocab.allowed.sum())} of "
            f"{layout.vocab.size}): use the same pair of teacher and student, {REFILL}"
        )
    if codec.label != layout.codec.label:
        raise ArtifactError(
            f"{source} has {codec.label}, and this recipe asks for {layout.codec.label}: set "
            f"{codec.settings}, {REFILL}"
        )
    missing = [value for value in layout.codec.temperatures if value not in codec.temperatures]
    if missing:
        raise ArtifactError(
            f"{source} has records at temperature "
            f"{', '.join(f'{value:g}' for value in codec.temperatures)}, and this recipe needs "
            f"{', '.join(f'{value:g}' for value in missing)} too: change curriculum.temperature "
            f"and baseline.temperature, {REFILL}"
        )


def _find_teacher(source: Path, metadata: CacheMetadata, model: ModelIdentity) -> ExportedTeacher:
    """The outputs of a model. Raises ArtifactError if the export lacks them."""
    same_files = [entry for entry in metadata.teachers if entry.model.files == model.files]
    for entry in same_files:
        if entry.model.quantization == model.quantization:
            return entry
    if same_files:
        raise ArtifactError(
            f"{source} was filled with teacher.quantization={same_files[0].model.quantization}, "
            f"and this recipe has {model.quantization}: use the same, {REFILL}"
        )
    labels = ", ".join(entry.model.label for entry in metadata.teachers)
    other = metadata.teachers[0].model.files
    changed = sorted(
        name for name in {*other, *model.files} if other.get(name) != model.files.get(name)
    )
    raise ArtifactError(
        f"{source} has the outputs of another teacher ({labels}; {model.label} differs in "
        f"{changed[0]}{f' and {len(changed) - 1} more files' if len(changed) > 1 else ''}): use "
        f"the same model, {REFILL}"
    )


def _check_states(
    source: Path,
    cache: PlannedCache,
    teacher: ExportedTeacher,
    metadata: CacheMetadata,
) -> None:
    """Raise ArtifactError if hidden states have another type than the recipe's."""
    if metadata.codec is None and teacher.state_dtype != cache.state_dtype:
        raise ArtifactError(
            f"{source} has the hidden states of a teacher in {teacher.state_dtype}, and here it "
            f"runs in {cache.state_dtype}: set teacher.dtype={teacher.state_dtype}, {REFILL}"
        )


def _imported_cache(
    source: Path, metadata: CacheMetadata, teacher: ExportedTeacher
) -> ImportedCache:
    info: dict[str, Any] = {
        "mode": metadata.mode,
        "backend": metadata.backend,
        "imported": {
            "versions": metadata.versions,
            "fingerprint": metadata.fingerprint,
            "samples": teacher.samples,
        },
        **({"codec": metadata.codec} if metadata.codec else {"state_dtype": teacher.state_dtype}),
        "error": teacher.error,
    }

    def copy_files(folder: Path) -> None:
        for name in metadata.files_of(teacher, "head/*"):
            (folder / "head").mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / "head" / Path(name).name)
        for name in metadata.files_of(teacher, CHANNELS):
            shutil.copyfile(source / name, folder / CHANNELS)

    outputs = ExportedOutputs(source, metadata, teacher)
    return ImportedCache(outputs, metadata.read_codec(), lambda: info, copy_files)


def _find_samples(
    source: Path, cache: PlannedCache, splits: Sequence[TokenizedSplit], outputs: OutputSource
) -> dict[str, dict[int, Any]]:
    """The place of each row of each split. Raises ArtifactError if any is missing."""
    places: dict[str, dict[int, Any]] = {}
    for split in splits:
        rows = cache.rows[split.name].tolist()
        places[split.name] = {row: outputs.find(split, row) for row in rows}
        missing = [row for row, place in places[split.name].items() if place is None]
        if missing:
            raise ArtifactError(
                f"{source} lacks {len(missing)} of the {len(rows)} samples of {split.name}, first "
                f"{split.ids[missing[0]].decode()} (its tokens or its loss mask are not there): "
                f"use the data and the section `prompt` of the exporting run, {REFILL}"
            )
    return places


def _write_shards(
    shards: Sequence[CacheShard],
    places: Mapping[str, Mapping[int, Any]],
    outputs: OutputSource,
    fingerprint: str,
) -> None:
    """Write shards, their checksums and their manifests. Raises ResourceError for a full disk."""
    # Read in the order of the source, since its files may be compressed; write anywhere.
    todo = sorted(
        (places[shard.split][row], number, index)
        for number, shard in enumerate(shards)
        for index, row in enumerate(shard.rows.tolist())
    )
    checksums = [np.zeros(len(shard.rows), np.uint32) for shard in shards]
    for shard in shards:
        shard.allocate()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open_shard(shard)) for shard in shards]
        for place, number, index in todo:
            shard = shards[number]
            stored = outputs.read(place)
            _check_outputs(shard, index, stored)
            with explain_disk_errors(shard.path):
                row = int(shard.rows[index])
                checksums[number][index] = shard.write(files[number].fileno(), row, stored)
    for shard, values in zip(shards, checksums, strict=True):
        shard.finish(values, fingerprint, {})


@contextlib.contextmanager
def _open_shard(shard: CacheShard) -> Iterator[IO[bytes]]:
    """The file of a shard, which is on disk at the end of the block."""
    with explain_disk_errors(shard.path), shard.path.open("r+b", buffering=0) as stream:
        yield stream
        os.fsync(stream.fileno())


def _check_outputs(shard: CacheShard, index: int, stored: Tensor) -> None:
    """Raise ArtifactError if the outputs of a row do not have the shape and type of the shard."""
    expected = (int(shard.offsets[index + 1] - shard.offsets[index]), shard.width)
    if tuple(stored.shape) == expected and stored.dtype == getattr(torch, shard.dtype):
        return
    raise ArtifactError(
        f"the imported outputs of row {shard.rows[index]} of {shard.split} are "
        f"{tuple(stored.shape)} {stored.dtype}, and the cache needs {expected} {shard.dtype}: "
        "export them again"
    )
