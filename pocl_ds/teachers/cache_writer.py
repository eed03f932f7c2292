"""Writes the shards of the teacher cache from the teacher's hidden states."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from numpy.typing import NDArray

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ResourceError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.runtime import distributed
from pocl_ds.runtime.formatting import format_size
from pocl_ds.runtime.hashing import token_keys
from pocl_ds.runtime.progress import Progress
from pocl_ds.teachers.cache_shard import STEP, CacheShard
from pocl_ds.teachers.mode_selection import TeacherUsage, measure_and_select_mode
from pocl_ds.teachers.quantized_states import StateStorage
from pocl_ds.teachers.state_sources import HiddenStateSource, SourceFactory
from pocl_ds.teachers.state_storage import prepare_storage
from pocl_ds.workflow.files import atomic_directory, explain_disk_errors, write_json

LOGIT_BYTES = 256 << 20  # of the logits that are encoded at once


def fill_cache(
    directory: Path,
    sources: SourceFactory,
    codec: RecordCodec | None,
    splits: Sequence[TokenizedSplit],
    shards: list[CacheShard],
    unfinished: list[CacheShard],
    *,
    usage: TeacherUsage,
    seed: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Write the unfinished shards and the head, after a check that the teacher does not depend on
    the batch. With teacher.mode=auto select a mode first. Returns both for the manifest.

    directory: of the teacher's cache. codec: None caches hidden states. shards: of all teachers.
    unfinished: of this one. seed: of random records. All ranks call it together. Raises
    ResourceError if the caches exceed max_disk_gb.
    """
    backend, info = sources.config.backend, dict[str, Any]()
    with contextlib.ExitStack() as stack:
        source = None
        # Select a mode. An online teacher runs in transformers, so its time is measured there: with
        # vLLM, a cache may take less time than the selection assumes.
        if sources.teacher.mode == "auto":
            source = stack.enter_context(sources.open("transformers", splits[0]))
            info["batch_invariance"] = source.check(splits[0])
            path = directory / f"mode-{fingerprint[:16]}.json"
            info |= measure_and_select_mode(
                source, splits, shards, usage, path, sources.config.max_disk_gb
            )
            if info["mode"] == "online":
                return info
            if backend != "transformers":
                stack.close()
                source = None
        check_size(shards, sources.config.max_disk_gb)

        # Fill the cache.
        if source is None:
            source = stack.enter_context(sources.open(backend, splits[0]))
            info["batch_invariance"] = source.check(splits[0])
        storage = StateStorage()
        if codec is None:
            storage, error = prepare_storage(
                directory,
                source,
                *_largest_split(splits, [s for s in shards if s.directory == directory]),
                sources.config.hidden_dtype,
                usage.temperatures,
            )
            info |= error
        CacheWriter(directory, source, codec, storage, seed).write(splits, unfinished, fingerprint)
    return info


def _largest_split(
    splits: Sequence[TokenizedSplit], shards: Sequence[CacheShard]
) -> tuple[TokenizedSplit, NDArray[np.int64]]:
    """The split of which a cache has most rows, and these rows."""
    rows = [
        np.concatenate([shard.rows for shard in shards if shard.split == split.name])
        for split in splits
    ]
    return max(zip(splits, rows, strict=True), key=lambda pair: len(pair[1]))


def check_size(shards: Sequence[CacheShard], max_disk_gb: float | None) -> None:
    """Raise ResourceError if the shards of all teachers exceed teacher_cache.max_disk_gb."""
    size = sum(shard.bytes for shard in shards)
    if max_disk_gb is not None and size > max_disk_gb * 1e9:
        raise ResourceError(
            f"the teacher cache needs {format_size(size)}, more than "
            f"teacher_cache.max_disk_gb={max_disk_gb:g}: raise it, or set teacher.mode to "
            "cached_topk, auto or online"
        )


class CacheWriter:
    """Writes shards from a source of hidden states. All ranks call every method together."""

    def __init__(
        self,
        directory: Path,
        source: HiddenStateSource,
        codec: RecordCodec | None,
        storage: StateStorage,
        seed: int,
    ) -> None:
        """directory: of the teacher's cache. codec: None caches hidden states, as `storage` stores
        them. seed: of random records.
        """
        self.directory, self.source, self.seed = directory, source, seed
        self.codec, self.storage = codec, storage
        self.vocab = source.vocab.to(distributed.device())

    def write(
        self, splits: Sequence[TokenizedSplit], unfinished: list[CacheShard], fingerprint: str
    ) -> None:
        """Write the unfinished shards and the head. Raises ResourceError if the disk is full."""
        # The task of a job array that writes shard 0 also writes the head.
        if self.codec is None and any(shard.number == 0 for shard in unfinished):
            self._write_head()
        splits_by_name = {split.name: split for split in splits}
        total = sum(len(shard.rows) for shard in unfinished)
        with Progress(total, "samples", STEP) as progress:
            for shard in unfinished:
                self._allocate(shard, unfinished, fingerprint)
                self._write_shard(shard, splits_by_name[shard.split], fingerprint, progress)

    def _write_head(self) -> None:
        """Write the head, which training loads in place of the model."""
        with self.source.head() as head:
            if distributed.rank() == 0:
                assert head.weight is not None
                state = {"weight": head.weight.detach().to("cpu", copy=True)}
                if head.bias is not None:
                    state["bias"] = head.bias.detach().to("cpu", copy=True)
                with atomic_directory(self.directory / "head") as folder:
                    save_torch_state_dict(state, folder, metadata={"format": "pt"})
                    settings = {"scale": head.scale, "soft_cap": head.soft_cap}
                    write_json(folder / "head.json", settings)

    def _allocate(self, shard: CacheShard, unfinished: list[CacheShard], fingerprint: str) -> None:
        """Reserve a shard's file. Raises ResourceError on all ranks if the disk is full."""
        with distributed.raise_on_all_ranks("reserve disk space for the teacher cache"):
            if distributed.rank() == 0:
                (shard.directory / shard.manifest_name).unlink(missing_ok=True)
                try:
                    shard.allocate()
                except ResourceError as error:
                    missing = sum(
                        other.bytes
                        for other in unfinished
                        if other.finished_manifest(fingerprint) is None
                    )
                    raise ResourceError(
                        f"{error}; this teacher's unfinished shards need {format_size(missing)}"
                    ) from None
        distributed.barrier()

    def _write_shard(
        self, shard: CacheShard, split: TokenizedSplit, fingerprint: str, progress: Progress
    ) -> None:
        """Compute a shard's outputs on all ranks, and write its checksums and its manifest."""
        # Each rank writes the rows of its micro-batches into the same file.
        start = time.monotonic()
        rank_batches = self.source.assign(np.asarray(split.total_tokens[shard.rows], np.int64))
        checksums = torch.zeros(len(shard.rows), dtype=torch.int64)
        temperatures = len(self.codec.temperatures) if self.codec else 0
        error = torch.zeros(temperatures, 2, dtype=torch.float64)
        with explain_disk_errors(shard.path):
            descriptor = os.open(shard.path, os.O_WRONLY)
            try:
                for number, places in enumerate(rank_batches[distributed.rank()]):
                    for part, outputs in self.source.states(split, shard.rows[places]):
                        self._write_rows(shard, split, part, outputs, descriptor, checksums, error)
                    progress.advance(
                        sum(len(micro_batches[number]) for micro_batches in rank_batches)
                    )
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        # Join the ranks' checksums: each rank has zeros for the rows of the others.
        device = distributed.device()
        all_checksums = distributed.all_sum(checksums.to(device)).cpu().numpy().astype(np.uint32)
        info: dict[str, Any] = {"seconds": time.monotonic() - start}
        if self.codec:
            info["error"] = distributed.all_sum(error.to(device)).tolist()
        distributed.barrier()

        if distributed.rank() == 0:
            shard.finish(all_checksums, fingerprint, info)

    def _write_rows(
        self,
        shard: CacheShard,
        split: TokenizedSplit,
        rows: NDArray[np.int64],
        outputs: torch.Tensor,
        descriptor: int,
        checksums: torch.Tensor,
        error: torch.Tensor,
    ) -> None:
        """Write the outputs of some rows, given their hidden states [loss tokens, width]. Sets
        their checksums, and adds to the records' error.
        """
        counts = [int(split.loss_tokens[row]) for row in rows]
        if self.codec:
            keys = token_keys(self.seed, [split.ids[row] for row in rows], counts)
            outputs = self._encode(self.codec, outputs.to(distributed.device()), keys, error)
        else:
            outputs = self.storage.encode(outputs)
        parts = outputs.cpu().split(counts)
        for row, part in zip(rows.tolist(), parts, strict=True):
            checksums[shard.place(row)] = shard.write(descriptor, row, part)

    def _encode(
        self,
        codec: RecordCodec,
        hidden: torch.Tensor,
        keys: NDArray[np.uint64],
        error: torch.Tensor,
    ) -> torch.Tensor:
        """Records [n, bytes] of hidden states [n, width], a chunk of logits at a time. keys: of the
        tokens, [n].
        """
        rows = max(1, LOGIT_BYTES // (4 * codec.size))
        records = [torch.empty(0, codec.bytes, dtype=torch.uint8, device=hidden.device)]
        with self.source.head() as head:
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                logits = self.vocab.teacher_logits(head, hidden[chunk])
                records.append(codec.encode(logits, keys[chunk]))
                error += codec.error_sums(logits, records[-1]).cpu()
        return torch.cat(records)
