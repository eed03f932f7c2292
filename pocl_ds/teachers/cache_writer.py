"""Computes the teacher's outputs, and writes the shards of the teacher cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from numpy.typing import NDArray

from pocl_ds.config import TeacherCacheConfig, TeacherConfig, ds_config
from pocl_ds.curriculum.micro_batches import assign_by_tokens
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import sharded_loading, start_deepspeed
from pocl_ds.errors import ResourceError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.models.batch_invariance import choose_samples
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.heads import supports_packing
from pocl_ds.models.recipe_model import ModelLoader, zero_sizes
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.runtime.hashing import token_keys
from pocl_ds.runtime.progress import Progress
from pocl_ds.teachers.cache import STEP, CacheShard
from pocl_ds.teachers.invariance import check_teacher, teacher_dtype
from pocl_ds.teachers.mode_selection import (
    ModeCosts,
    TeacherUsage,
    load_or_select_mode,
    measure_disk_rates,
    usable_bytes,
)
from pocl_ds.teachers.routed import free_memory
from pocl_ds.teachers.teacher import OnlineTeacher
from pocl_ds.workflow.files import atomic_directory, explain_disk_errors, save_array, write_json
from pocl_ds.workflow.manifest import write_manifest

LOGIT_BYTES = 256 << 20  # of the logits that are encoded at once


class CacheWriter:
    """The teacher model, for the shards of one call. All ranks call every method together."""

    def __init__(
        self,
        directory: Path,
        teacher: TeacherConfig,
        path: str,
        vocab: VocabMap,
        codec: RecordCodec | None,
        config: TeacherCacheConfig,
        seed: int,
        load: ModelLoader,
    ) -> None:
        """directory: of the teacher's cache. path: of the teacher. codec: None caches hidden
        states. seed: of random records. load: see `build_trainer`.
        """
        # Load the teacher, in shards if ZeRO-3 is configured.
        teacher_ds_config = ds_config.resolve_teacher(
            teacher.ds_config,
            dtype=resolve_dtype(teacher.dtype),
            ranks=distributed.world_size(),
            micro_batch_size=1,
            sizes=zero_sizes(path, teacher),
        )
        if teacher_ds_config:
            start_deepspeed()
        with sharded_loading(teacher_ds_config):
            model = load(path, teacher, None)
        self.teacher = OnlineTeacher(model, teacher_ds_config, vocab)
        self.packed = supports_packing(model)
        self.directory, self.path, self.mode, self.config = directory, path, teacher.mode, config
        self.codec, self.seed = codec, seed
        self.dtype = teacher_dtype(teacher)

    def write(
        self,
        splits: Sequence[TokenizedSplit],
        shards: list[CacheShard],
        unfinished: list[CacheShard],
        usage: TeacherUsage,
        fingerprint: str,
    ) -> dict[str, Any]:
        """Write the unfinished shards and the head, after a check that the teacher does not depend
        on the batch. With teacher.mode=auto select a mode first. Returns both for the manifest.
        Raises ResourceError if the cache exceeds max_disk_gb.

        shards: of all teachers.
        """
        # Check the teacher, select a mode, and check the size of the cache.
        selection: dict[str, Any] = {"batch_invariance": self._check_teacher(splits[0])}
        if self.mode == "auto":
            path = self.directory / f"mode-{fingerprint[:16]}.json"
            selection |= self._select_mode(splits, shards, usage, path)
            if selection["mode"] == "online":
                return selection
        size, max_disk_gb = sum(shard.bytes for shard in shards), self.config.max_disk_gb
        if max_disk_gb is not None and size > max_disk_gb * 1e9:
            raise ResourceError(
                f"the teacher cache needs {size / 1e9:.3f} GB, more than "
                f"teacher_cache.max_disk_gb={max_disk_gb:g}: raise it, or set teacher.mode to "
                "cached_topk, auto or online"
            )

        # The task of a job array that writes shard 0 also writes the head.
        if self.codec is None and any(shard.number == 0 for shard in unfinished):
            self._write_head()
        splits_by_name = {split.name: split for split in splits}
        total = sum(len(shard.rows) for shard in unfinished)
        with Progress(total, "samples", STEP) as progress:
            for shard in unfinished:
                self._allocate(shard, unfinished, fingerprint)
                self._write_shard(shard, splits_by_name[shard.split], fingerprint, progress)
        return selection

    def close(self) -> None:
        """Free the teacher. The writer cannot be used any more."""
        self.teacher.close()
        del self.teacher
        free_memory()

    def _check_teacher(self, split: TokenizedSplit) -> dict[str, Any]:
        """Check on a few samples of a split that the teacher does not depend on the batch."""
        lengths = np.asarray(split.total_tokens, np.int64)
        rows = choose_samples(
            lengths,
            seed=0,
            max_tokens=max(self.config.max_batch_tokens, int(lengths.max(initial=1))),
            packed=self.packed,
        )

        def batch_of(batch_rows: Sequence[int]) -> Batch:
            return collate(split, batch_rows, packed=self.packed).to(distributed.device())

        label = f"{STEP}: the teacher {self.path}"
        return check_teacher(label, self.teacher, split, rows, batch_of, dtype=self.dtype)

    def _select_mode(
        self,
        splits: Sequence[TokenizedSplit],
        shards: list[CacheShard],
        usage: TeacherUsage,
        path: Path,
    ) -> dict[str, Any]:
        """Select online or cached hidden states by measurements on this machine, and record the
        selection in `path`. The result is the same on all ranks.
        """
        # Time a forward pass over one micro-batch per rank; the first one warms up.
        split = splits[0]
        lengths, rank_batches = self._assign_rows(split, np.arange(len(split)))
        own_rows = rank_batches[distributed.rank()][0]
        batch = collate(split, own_rows, packed=self.packed).to(distributed.device())
        seconds = 0.0
        for _ in range(2):
            distributed.synchronize_ranks()
            start = time.perf_counter()
            self.teacher.outputs(batch)
            distributed.synchronize_ranks()
            seconds = time.perf_counter() - start
        tokens = sum(int(lengths[micro_batches[0]].sum()) for micro_batches in rank_batches)

        def measure_costs() -> ModeCosts:
            cache_bytes = sum(shard.bytes for shard in shards)
            write_rate, read_rate = measure_disk_rates(self.directory, cache_bytes)
            return ModeCosts(
                tokens=sum(int(split.total_tokens.sum()) for split in splits),
                visits_per_sample=usage.visits_per_sample,
                forward_tokens_per_second=tokens / seconds,
                cache_bytes=cache_bytes,
                usable_bytes=usable_bytes(self.directory, self.config.max_disk_gb),
                write_bytes_per_second=write_rate,
                read_bytes_per_second=read_rate,
            )

        # Rank 0 measures the disk and decides.
        selection = None
        with distributed.raise_on_all_ranks("select the teacher's mode"):
            if distributed.rank() == 0:
                selection = load_or_select_mode(path, measure_costs)
        result: dict[str, Any] = distributed.broadcast_object(selection)
        return result

    def _write_head(self) -> None:
        """Write the head, which training loads in place of the model."""
        with self.teacher.head() as head:
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
                        f"{error}; this teacher's unfinished shards need {missing / 1e9:.3f} GB"
                    ) from None
        distributed.barrier()

    def _write_shard(
        self, shard: CacheShard, split: TokenizedSplit, fingerprint: str, progress: Progress
    ) -> None:
        """Compute a shard's outputs on all ranks, and write its checksums and its manifest."""
        # Each rank writes the rows of its micro-batches into the same file.
        start = time.monotonic()
        _, rank_batches = self._assign_rows(split, shard.rows)
        checksums = torch.zeros(len(shard.rows), dtype=torch.int64)
        temperatures = len(self.codec.temperatures) if self.codec else 0
        error = torch.zeros(temperatures, 2, dtype=torch.float64)
        with explain_disk_errors(shard.path):
            descriptor = os.open(shard.path, os.O_WRONLY)
            try:
                for number, places in enumerate(rank_batches[distributed.rank()]):
                    rows = shard.rows[places]
                    self._write_batch(shard, split, rows, descriptor, checksums, error)
                    progress.advance(
                        sum(len(micro_batches[number]) for micro_batches in rank_batches)
                    )
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        # Join the ranks' checksums: each rank has zeros for the rows of the others.
        device = distributed.device()
        all_checksums = distributed.all_sum(checksums.to(device)).cpu().numpy().astype(np.uint32)
        info: dict[str, Any] = {"samples": len(shard.rows), "seconds": time.monotonic() - start}
        if self.codec:
            info["error"] = distributed.all_sum(error.to(device)).tolist()
        distributed.barrier()

        # Write the checksums, then the manifest, which marks the shard as finished.
        if distributed.rank() == 0:
            path = shard.checksum_path
            with explain_disk_errors(path), path.open("wb") as file:
                save_array(file, all_checksums)
            write_manifest(
                shard.directory,
                STEP,
                fingerprint,
                name=shard.manifest_name,
                files=[shard.path, path],
                info=info,
            )

    def _write_batch(
        self,
        shard: CacheShard,
        split: TokenizedSplit,
        rows: NDArray[np.int64],
        descriptor: int,
        checksums: torch.Tensor,
        error: torch.Tensor,
    ) -> None:
        """Write the outputs of some rows after one forward pass, set their checksums, and add to
        the records' error. A rank without rows runs one token that is not stored, as ZeRO-3 needs
        all ranks.
        """
        batch = collate(split, rows, packed=self.packed).to(distributed.device())
        outputs = self.teacher.outputs(batch)
        counts = torch.bincount(batch.sample_of_token.cpu(), minlength=len(rows)).tolist()
        if self.codec:
            keys = token_keys(self.seed, [split.ids[row] for row in batch.rows], counts)
            outputs = self._encode(self.codec, outputs, keys, error)
        parts = outputs.cpu().split(counts)
        for row, part in zip(batch.rows, parts, strict=True):
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
        with self.teacher.head() as head:
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                logits = self.teacher.vocab.teacher_logits(head, hidden[chunk])
                records.append(codec.encode(logits, keys[chunk]))
                error += codec.error_sums(logits, records[-1]).cpu()
        return torch.cat(records)

    def _assign_rows(
        self, split: TokenizedSplit, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[list[NDArray[np.int64]]]]:
        """Lengths of some rows, and their micro-batches on each rank, as indices into `rows`."""
        lengths = np.asarray(split.total_tokens[rows], np.int64)
        rank_batches = assign_by_tokens(
            lengths,
            ranks=distributed.world_size(),
            max_tokens=max(self.config.max_batch_tokens, int(lengths.max(initial=1))),
            packed=self.packed,
        )
        return lengths, rank_batches
