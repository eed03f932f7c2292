"""The stage `teach`: the teacher reads each sample once, and what it says is kept for all stages
and epochs: its hidden states, or with teacher.mode=cached_topk records of its largest probabilities.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict

from pocl_ds.config import StudentConfig, TeacherCacheConfig, TeacherConfig, ds_config
from pocl_ds.curriculum.micro_batches import share_by_tokens
from pocl_ds.data.batches import collate
from pocl_ds.data.tokenized import EncodedSplit
from pocl_ds.engines.engine import sharded_loading, start_deepspeed
from pocl_ds.errors import RecipeError, ResourceError
from pocl_ds.losses.top_k import TopK
from pocl_ds.models.heads import packs
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer, resolve_model
from pocl_ds.models.quantization import check_teacher
from pocl_ds.models.vocab import Ids, reconcile_models
from pocl_ds.runtime import distributed
from pocl_ds.runtime.tracking import Progress
from pocl_ds.teachers.cache import STAGE, Shard
from pocl_ds.teachers.mode_selection import Costs, Use, choose, disk_rates, free_bytes
from pocl_ds.teachers.teacher import LiveTeacher
from pocl_ds.workflow.run_dir import (
    RunDirectory,
    atomic_directory,
    disk_faults,
    read_manifest,
    save_array,
    write_json,
    write_manifest,
)

log = logging.getLogger("pocl_ds")

SPLITS = ("train", "validation")
LOGIT_BYTES = 256 << 20  # of one chunk of logits, while the largest are picked


def teach(
    run: RunDirectory,
    *,
    teacher: TeacherConfig,
    student: StudentConfig,
    config: TeacherCacheConfig,
    use: Use,
    fingerprint: str,
    shard: int | None = None,
) -> None:
    """Store what the teacher says at the loss positions of training and validation samples, and the
    head that reads it.

    All ranks call it; each computes its share of a shard. shard: only this one of every split. With
    teacher.mode=auto it is measured first whether that is worth it. Raises RecipeError for a shard
    that does not exist or a k that is too large, ResourceError for a full disk; what is whole is
    kept.
    """
    manifest = read_manifest(run.teacher_cache)
    if manifest and manifest.fingerprint == fingerprint:
        return
    if shard is not None and not 0 <= shard < config.shards:
        raise RecipeError(
            f"shard {shard} does not exist: teacher_cache.shards={config.shards}, choose 0 to "
            f"{config.shards - 1}"
        )
    if distributed.world_size() > 1:
        start_deepspeed()
    path, student_path = resolve_model(teacher), resolve_model(student)
    check_teacher(
        teacher,
        load_model_config(
            path, trust_remote_code=teacher.trust_remote_code, revision=teacher.revision
        ),
    )
    splits = [EncodedSplit.open(run.data, name) for name in SPLITS]
    ids = Ids.of(reconcile_models(teacher, path, student, student_path))
    top_k = (
        TopK(config.top_k, ids.size, use.temperatures) if teacher.mode == "cached_topk" else None
    )
    if top_k:
        top_k.check(int(ids.allowed.sum()))
    width, dtype = (top_k.bytes, "uint8") if top_k else (head_width(path, teacher), teacher.dtype)
    numbers = range(config.shards)
    shards = [
        Shard.of(run.teacher_cache, split, number, config.shards, width, dtype)
        for split in splits
        for number in numbers
    ]
    run.teacher_cache.mkdir(parents=True, exist_ok=True)
    unsealed = [
        one for one in shards if shard in (None, one.number) and one.sealed(fingerprint) is None
    ]
    info: dict[str, Any] = (
        {"mode": "cached_topk", "top_k": asdict(top_k)}
        if top_k
        else {"mode": "cached_hidden_states"}
    )
    if todo := distributed.from_rank_zero(unsealed):
        teaching = _Teaching(run, teacher, student, (path, student_path), ids, top_k, config)
        if teacher.mode == "auto":
            info |= teaching.choice(
                splits, shards, use, run.teacher_cache / f"choice-{fingerprint[:16]}.json"
            )
            todo = todo if info["mode"] == "cached_hidden_states" else []
        needed, allowed = sum(one.bytes for one in shards), config.max_disk_gb
        if todo and allowed is not None and needed > allowed * 1e9:
            raise ResourceError(
                f"teacher_cache.max_disk_gb={allowed:g} and {needed / 1e9:.3f} GB would be kept: raise it, or "
                f"set "
                "teacher.mode to topk, auto or live"
            )
        if (
            any(one.number == 0 for one in todo) and top_k is None
        ):  # so that of an array's tasks only one writes it
            teaching.head()
        teaching.all(todo, {split.name: split for split in splits}, fingerprint)
    distributed.barrier()
    if distributed.rank() == 0 and (
        info["mode"] == "online" or all(one.sealed(fingerprint) for one in shards)
    ):
        _seal(run, shards if info["mode"] != "online" else [], info, fingerprint)
    distributed.barrier()


def _seal(run: RunDirectory, shards: list[Shard], info: dict[str, Any], fingerprint: str) -> None:
    """The stage's own manifest; shards of another division go."""
    kept = {
        path.name
        for one in shards
        for path in (one.path, one.checksums, run.teacher_cache / one.manifest)
    }
    for path in run.teacher_cache.glob("*-of-*"):
        if path.name not in kept:
            path.unlink()
    if shards:
        tokens = int(sum(one.starts[-1] for one in shards))
        info |= {
            "shards": shards[-1].count,
            "width": shards[0].width,
            "dtype": shards[0].dtype,
            "tokens": tokens,
            "bytes": sum(one.bytes for one in shards),
        }
        log.info(
            "teach: %.3f GB, %d bytes for each of %d tokens",
            info["bytes"] / 1e9,
            info["bytes"] // max(tokens, 1),
            tokens,
        )
    if info["mode"] == "cached_topk":
        found = [one.sealed(fingerprint) for one in shards]
        sums = np.sum([one.info["lost"] for one in found if one], axis=0) / max(info["tokens"], 1)
        info["lost"] = [
            {"temperature": temperature, "mass": mass, "kl": kl}
            for temperature, (mass, kl) in zip(
                info["top_k"]["temperatures"], sums.tolist(), strict=True
            )
        ]
        for one in info["lost"]:
            log.info(
                "teach: at temperature %.2f the %d largest leave out a mass of %.4f, and %.4f nats a "
                "token (KL to what is kept, its "
                "rest spread evenly)",
                one["temperature"],
                info["top_k"]["k"],
                one["mass"],
                one["kl"],
            )
    write_manifest(
        run.teacher_cache,
        STAGE,
        fingerprint,
        info=info,
        files=sorted((run.teacher_cache / "head").glob("*")),
    )


def head_width(path: str, teacher: TeacherConfig) -> int:
    """Width of the head's input, from the configuration alone."""
    config: Any = load_model_config(
        path, trust_remote_code=teacher.trust_remote_code, revision=teacher.revision
    )
    return int(
        getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    )  # OPT projects before its head


class _Teaching:
    """The live teacher, for the shards of one call."""

    def __init__(
        self,
        run: RunDirectory,
        teacher: TeacherConfig,
        student: StudentConfig,
        paths: tuple[str, str],
        ids: Ids,
        top_k: TopK | None,
        config: TeacherCacheConfig,
    ) -> None:
        ranks = distributed.world_size()
        frozen = ds_config.resolve_teacher(
            teacher.ds_config, dtype=teacher.dtype, ranks=ranks, micro_batch_size=1
        )
        if frozen:
            start_deepspeed()
        tokenizer = load_tokenizer(
            paths[1], trust_remote_code=student.trust_remote_code, revision=student.revision
        )
        with sharded_loading(frozen):
            model = load_model(
                paths[0],
                dtype=teacher.dtype,
                attention=teacher.attn_implementation,
                dropout=None,
                trust_remote_code=teacher.trust_remote_code,
                revision=teacher.revision,
                quantization=teacher.quantization,
            )
        self.packed, self.pad_id, self.tokens = (
            packs(model),
            tokenizer.pad_token_id,
            config.max_batch_tokens,
        )
        self.live = LiveTeacher(model, frozen, ids)
        self.run, self.top_k, self.config = run, top_k, config

    def head(self) -> None:
        """Write the head as it is applied: what training loads in place of the model."""
        with self.live.head() as head:
            if distributed.rank() == 0:
                assert head.weight is not None
                state = {"weight": head.weight.detach().to("cpu", copy=True)}
                if head.bias is not None:
                    state["bias"] = head.bias.detach().to("cpu", copy=True)
                with atomic_directory(self.run.teacher_cache / "head") as folder:
                    save_torch_state_dict(state, folder, metadata={"format": "pt"})
                    write_json(
                        folder / "head.json", {"scale": head.scale, "soft_cap": head.soft_cap}
                    )

    def choice(
        self, splits: list[EncodedSplit], shards: list[Shard], use: Use, path: Path
    ) -> dict[str, Any]:
        """Whether hidden states are worth keeping, by a look at this machine; the same on all
        ranks, and recorded.
        """
        split = splits[0]
        lengths = np.asarray(split.total_tokens, np.int64)
        dealt = share_by_tokens(
            lengths,
            ranks=distributed.world_size(),
            tokens=max(self.tokens, int(lengths.max(initial=1))),
            packed=self.packed,
        )
        batch = collate(split, dealt[distributed.rank()][0], self.pad_id, packed=self.packed).to(
            distributed.device()
        )
        for again in range(2):  # the first forward warms up
            distributed.settle()
            start = time.perf_counter()
            self.live.states(batch)
            distributed.settle()
            seconds = time.perf_counter() - start if again else 0.0
        rate = sum(int(lengths[theirs[0]].sum()) for theirs in dealt) / seconds
        kept = sum(one.bytes for one in shards)

        def costs() -> Costs:
            written, read = disk_rates(self.run.teacher_cache, kept)
            return Costs(
                sum(int(one.total_tokens.sum()) for one in splits),
                use.visits,
                rate,
                kept,
                free_bytes(self.run.teacher_cache, self.config.max_disk_gb),
                written,
                read,
            )

        with distributed.together("measure what the teacher's hidden states cost"):
            found = choose(path, costs) if distributed.rank() == 0 else None
        chosen: dict[str, Any] = distributed.from_rank_zero(found)
        return chosen

    def all(self, todo: list[Shard], splits: dict[str, EncodedSplit], fingerprint: str) -> None:
        """Shard by shard."""
        with Progress(sum(len(shard.rows) for shard in todo), "samples", STAGE) as progress:
            for shard in todo:
                self._shard(shard, splits[shard.split], fingerprint, progress, todo)

    def _shard(
        self,
        shard: Shard,
        split: EncodedSplit,
        fingerprint: str,
        progress: Progress,
        shards: list[Shard],
    ) -> None:
        start = time.monotonic()
        self.lost = torch.zeros(
            len(self.top_k.temperatures) if self.top_k else 0, 2, dtype=torch.float64
        )
        with distributed.together("make room for the teacher's hidden states"):
            if distributed.rank() == 0:
                (shard.directory / shard.manifest).unlink(missing_ok=True)
                try:
                    shard.allocate()
                except ResourceError as error:
                    left = sum(one.bytes for one in shards if one.sealed(fingerprint) is None)
                    raise ResourceError(
                        f"{error}; what is not there yet needs {left / 1e9:.3f} GB"
                    ) from None
        distributed.barrier()
        lengths = np.asarray(split.total_tokens[shard.rows.start : shard.rows.stop], np.int64)
        dealt = share_by_tokens(
            lengths,
            ranks=distributed.world_size(),
            tokens=max(self.tokens, int(lengths.max(initial=1))),
            packed=self.packed,
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
        kept = (
            distributed.all_sum(checksums.to(distributed.device())).cpu().numpy().astype(np.uint32)
        )
        info: dict[str, Any] = {"samples": len(shard.rows), "seconds": time.monotonic() - start}
        if self.top_k:
            info["lost"] = distributed.all_sum(self.lost.to(distributed.device())).tolist()
        distributed.barrier()
        if distributed.rank() == 0:
            with disk_faults(shard.checksums), shard.checksums.open("wb") as file:
                save_array(file, kept)
            write_manifest(
                shard.directory,
                STAGE,
                fingerprint,
                name=shard.manifest,
                files=[shard.path, shard.checksums],
                info=info,
            )

    def _batch(
        self, shard: Shard, split: EncodedSplit, rows: Any, stream: int, checksums: torch.Tensor
    ) -> None:
        """One forward; a rank without a sample runs a token that is not kept, so that no other
        waits for it.
        """
        batch = collate(split, rows, self.pad_id, packed=self.packed).to(distributed.device())
        states = self.live.states(batch)
        states = (self._records(states) if self.top_k else states).cpu()
        counts = torch.bincount(batch.sample_of_token.cpu(), minlength=len(rows)).tolist()
        for row, part in zip(batch.rows, states.split(counts[: len(batch.rows)]), strict=True):
            checksums[row - shard.rows.start] = shard.write(stream, row, part)

    def _records(self, states: torch.Tensor) -> torch.Tensor:
        """The largest probabilities of hidden states [n, width], a chunk of logits at a time."""
        assert self.top_k is not None
        found = [torch.empty(0, self.top_k.bytes, dtype=torch.uint8, device=states.device)]
        with self.live.head() as head:
            for part in states.split(max(1, LOGIT_BYTES // (4 * self.top_k.size))):
                logits = self.live.ids.teacher_logits(head, part)
                found.append(self.top_k.encode(logits))
                self.lost += self.top_k.lost(logits, found[-1]).cpu()
        return torch.cat(found)
