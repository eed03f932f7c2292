"""The stage `teach`: the teacher reads each sample once, and its hidden states are kept for all stages and epochs."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict

from pocl_ds import distributed, ds_config
from pocl_ds.artifacts import RunDirectory, atomic_directory, disk_faults, read_manifest, write_json, write_manifest
from pocl_ds.config import StudentConfig, TeachConfig, TeacherConfig
from pocl_ds.curriculum.dealing import share_by_tokens
from pocl_ds.data.batches import collate
from pocl_ds.data.encode import EncodedSplit
from pocl_ds.distill.engine import sharded_loading, start_deepspeed
from pocl_ds.distill.hidden_store import STAGE, Shard
from pocl_ds.distill.teacher import LiveTeacher
from pocl_ds.errors import RecipeError
from pocl_ds.models.heads import packs
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer, resolve_model
from pocl_ds.models.vocabulary import Ids, reconcile_models
from pocl_ds.tracking import Progress

log = logging.getLogger("pocl_ds")

SPLITS = ("train", "validation")


def teach(
    run: RunDirectory, *, teacher: TeacherConfig, student: StudentConfig, config: TeachConfig, fingerprint: str,
    shard: int | None = None,
) -> None:  # fmt: skip
    """Store the teacher's hidden states at the loss positions of training and validation samples, and its head.

    All ranks call it; each computes its share of a shard. shard: only this one of every split. Raises RecipeError for one that
    does not exist, ResourceError for a full disk; what is whole is kept.
    """
    manifest = read_manifest(run.teacher)
    if manifest and manifest.fingerprint == fingerprint:
        return
    if shard is not None and not 0 <= shard < config.shards:
        raise RecipeError(f"shard {shard} does not exist: teach.shards={config.shards}, choose 0 to {config.shards - 1}")
    if distributed.world_size() > 1:
        start_deepspeed()
    path = resolve_model(teacher)
    splits = [EncodedSplit.open(run.data, name) for name in SPLITS]
    width, dtype = head_width(path, teacher), teacher.dtype
    numbers = range(config.shards)
    shards = [Shard.of(run.teacher, split, number, config.shards, width, dtype) for split in splits for number in numbers]
    run.teacher.mkdir(parents=True, exist_ok=True)
    unsealed = [one for one in shards if shard in (None, one.number) and one.sealed(fingerprint) is None]
    if todo := distributed.from_rank_zero(unsealed):
        teaching = _Teaching(run, teacher, student, path, config.batch_tokens)
        if any(one.number == 0 for one in todo):  # so that of an array's tasks only one writes it
            teaching.head()
        teaching.all(todo, {split.name: split for split in splits}, fingerprint)
    distributed.barrier()
    if distributed.rank() == 0 and all(one.sealed(fingerprint) for one in shards):
        _seal(run, shards, fingerprint)
    distributed.barrier()


def _seal(run: RunDirectory, shards: list[Shard], fingerprint: str) -> None:
    """The stage's own manifest; shards of another division go."""
    kept = {path.name for one in shards for path in (one.path, one.checksums, run.teacher / one.manifest)}
    for path in run.teacher.glob("*-of-*"):
        if path.name not in kept:
            path.unlink()
    info = {"shards": shards[-1].count, "width": shards[0].width, "dtype": shards[0].dtype,
            "bytes": sum(one.bytes for one in shards), "tokens": int(sum(one.starts[-1] for one in shards))}  # fmt: skip
    write_manifest(run.teacher, STAGE, fingerprint, info=info, files=sorted((run.teacher / "head").glob("*")))
    log.info("teach: %.2f GB of hidden states, %d tokens x %d in %s", info["bytes"] / 1e9, info["tokens"],
             info["width"], info["dtype"])  # fmt: skip


def head_width(path: str, teacher: TeacherConfig) -> int:
    """Width of the head's input, from the configuration alone."""
    config: Any = load_model_config(path, trust_remote_code=teacher.trust_remote_code, revision=teacher.revision)
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)  # OPT projects before its head


class _Teaching:
    """The live teacher, for the shards of one call."""

    def __init__(self, run: RunDirectory, teacher: TeacherConfig, student: StudentConfig, path: str, batch_tokens: int) -> None:
        ranks = distributed.world_size()
        frozen = ds_config.resolve_teacher(teacher.ds_config, dtype=teacher.dtype, ranks=ranks, micro_batch_size=1)
        if frozen:
            start_deepspeed()
        student_path = resolve_model(student)
        tokenizer = load_tokenizer(student_path, trust_remote_code=student.trust_remote_code, revision=student.revision)
        vocabulary = reconcile_models(teacher, path, student, student_path)
        with sharded_loading(frozen):
            model = load_model(path, dtype=teacher.dtype, attention=teacher.attention, dropout=None,
                               trust_remote_code=teacher.trust_remote_code, revision=teacher.revision)  # fmt: skip
        self.packed, self.pad_id, self.tokens = packs(model), tokenizer.pad_token_id, batch_tokens
        self.live = LiveTeacher(model, frozen, Ids.of(vocabulary))
        self.run = run

    def head(self) -> None:
        """Write the head as it is applied: what training loads in place of the model."""
        with self.live.head() as head:
            if distributed.rank() == 0:
                state = {"weight": head.weight.detach().to("cpu", copy=True)}
                if head.bias is not None:
                    state["bias"] = head.bias.detach().to("cpu", copy=True)
                with atomic_directory(self.run.teacher / "head") as folder:
                    save_torch_state_dict(state, folder, metadata={"format": "pt"})
                    write_json(folder / "head.json", {"scale": head.scale, "soft_cap": head.soft_cap})

    def all(self, todo: list[Shard], splits: dict[str, EncodedSplit], fingerprint: str) -> None:
        """Shard by shard."""
        with Progress(sum(len(shard.rows) for shard in todo), "samples", STAGE) as progress:
            for shard in todo:
                self._shard(shard, splits[shard.split], fingerprint, progress)

    def _shard(self, shard: Shard, split: EncodedSplit, fingerprint: str, progress: Progress) -> None:
        start = time.monotonic()
        with distributed.together("make room for the teacher's hidden states"):
            if distributed.rank() == 0:
                (shard.directory / shard.manifest).unlink(missing_ok=True)
                shard.allocate()
        distributed.barrier()
        lengths = np.asarray(split.total_tokens[shard.rows.start : shard.rows.stop], np.int64)
        dealt = share_by_tokens(
            lengths, ranks=distributed.world_size(), tokens=max(self.tokens, int(lengths.max(initial=1))), packed=self.packed
        )
        checksums = torch.zeros(len(shard.rows), dtype=torch.int64)
        with disk_faults(shard.path):
            stream = os.open(shard.path, os.O_WRONLY)
            try:
                for micro, places in enumerate(dealt[distributed.rank()]):
                    self._batch(shard, split, places + shard.rows.start, stream, checksums)
                    progress.advance(sum(len(theirs[micro]) for theirs in dealt))
                os.fsync(stream)
            finally:
                os.close(stream)
        kept = distributed.all_sum(checksums.to(distributed.device())).cpu().numpy().astype(np.uint32)
        distributed.barrier()
        if distributed.rank() == 0:
            with disk_faults(shard.checksums):
                np.save(shard.checksums, kept)
            write_manifest(shard.directory, STAGE, fingerprint, name=shard.manifest, files=[shard.path, shard.checksums],
                           info={"samples": len(shard.rows), "seconds": time.monotonic() - start})  # fmt: skip

    def _batch(self, shard: Shard, split: EncodedSplit, rows: Any, stream: int, checksums: torch.Tensor) -> None:
        """One forward; a rank without a sample runs a token that is not kept, so that no other waits for it."""
        batch = collate(split, rows, self.pad_id, packed=self.packed).to(distributed.device())
        states = self.live.hidden(batch).cpu()
        counts = torch.bincount(batch.sample_of_token.cpu(), minlength=len(rows)).tolist()
        for row, part in zip(batch.rows, states.split(counts[: len(batch.rows)]), strict=True):
            checksums[row - shard.rows.start] = shard.write(stream, row, part)
