"""Fills the teacher cache with the largest log-probabilities of a served teacher
(`teacher.endpoint`): the records of `TopKCodec` at temperature 1, without a model in this process.

Each answer is written when it arrives, and a journal next to the shard records its row and its
checksum, so that an interrupted shard continues with the missing rows.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import TeacherConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.generation.served_model import ServedModel, connect_to_teacher
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime.progress import Progress
from pocl_ds.teachers.cache_shard import STEP, CacheShard
from pocl_ds.workflow.files import explain_disk_errors

log = logging.getLogger("pocl_ds")

JOURNAL_ENTRY = np.dtype([("row", "<i8"), ("checksum", "<u4"), ("mass", "<f8"), ("filled", "<i8")])


class ShardJournal:
    """The rows of an unfinished shard that are in its file: an append-only file of JOURNAL_ENTRY,
    one for each row.
    """

    def __init__(self, shard: CacheShard) -> None:
        self.shard = shard
        self.path = shard.directory / f"{shard.name}.journal"

    def read(self) -> NDArray[Any]:
        """The entries whose row in the shard's file has their checksum, each row once."""
        if not self.path.is_file() or not self.shard.path.is_file():
            return np.empty(0, JOURNAL_ENTRY)
        if self.shard.path.stat().st_size != self.shard.bytes:
            return np.empty(0, JOURNAL_ENTRY)
        data = self.path.read_bytes()
        entries = np.frombuffer(data, JOURNAL_ENTRY, len(data) // JOURNAL_ENTRY.itemsize)
        with self.shard.path.open("rb") as stream:
            complete = [self._is_whole(entry, stream.fileno()) for entry in entries]
        _, first = np.unique(entries["row"][complete], return_index=True)
        return entries[complete][first]

    def _is_whole(self, entry: Any, descriptor: int) -> bool:
        shard = self.shard
        place = shard.place(entry["row"])
        if place >= len(shard.rows) or shard.rows[place] != entry["row"]:
            return False
        checksum = shard.written_checksum(descriptor, int(entry["row"]))
        return bool(checksum == entry["checksum"])


def fill_from_endpoint(
    teacher: TeacherConfig,
    codec: TopKCodec,
    vocab: VocabMap,
    splits: Sequence[TokenizedSplit],
    unfinished: Sequence[CacheShard],
    fingerprint: str,
) -> dict[str, Any]:
    """Write the unfinished shards of a served teacher. Returns what the manifest records.

    Raises ResourceError or ModelError if a server does not answer, or does not run this teacher;
    the rows that were written stay.
    """
    assert teacher.endpoint is not None
    splits_by_name = {split.name: split for split in splits}
    longest = max(int(split.total_tokens.max(initial=1)) for split in splits)
    model = connect_to_teacher(
        teacher.endpoint,
        saved="the samples so far are saved",
        max_length=longest + 1,  # each request generates a token
        top_k=codec.k,
    )
    try:
        log.info("%s: the teacher is %s at %s", STEP, model.name, ", ".join(model.endpoint.urls))
        total = sum(len(shard.rows) for shard in unfinished)
        with Progress(total, "samples", STEP) as progress:
            for shard in unfinished:
                split = splits_by_name[shard.split]
                _ShardWriter(model, codec, vocab, split, shard).write(fingerprint, progress)
    finally:
        model.close()
    return {"endpoint": {"model": model.name, "server": teacher.endpoint.server}}


class _ShardWriter:
    """Requests the rows of a shard that are missing, and writes their records."""

    def __init__(
        self,
        model: ServedModel,
        codec: TopKCodec,
        vocab: VocabMap,
        split: TokenizedSplit,
        shard: CacheShard,
    ) -> None:
        self.model, self.codec, self.vocab = model, codec, vocab
        self.split, self.shard = split, shard
        self.allowed = torch.from_numpy(vocab.allowed)
        # The student's id of each of the teacher's, -1 for one that takes no part.
        students = torch.arange(vocab.size)
        teachers = students if vocab.teacher_ids is None else vocab.teacher_ids
        self.student_ids = torch.full((int(teachers.max()) + 1,), -1)
        self.student_ids[teachers[self.allowed]] = students[self.allowed]

    def write(self, fingerprint: str, progress: Progress) -> None:
        """Write the rows that the journal does not have, then the checksums and the manifest."""
        shard, start = self.shard, time.monotonic()
        journal = ShardJournal(shard)
        entries = journal.read()
        if not len(entries):
            journal.path.unlink(missing_ok=True)
            (shard.directory / shard.manifest_name).unlink(missing_ok=True)
            shard.allocate()
        else:
            log.info("%s: %s has %d of %d rows", STEP, shard.path, len(entries), len(shard.rows))
        progress.advance(len(entries))
        remaining = np.setdiff1d(shard.rows, entries["row"])
        written = [entries]
        with explain_disk_errors(shard.path):
            descriptor = os.open(shard.path, os.O_WRONLY)
            try:
                with journal.path.open("ab") as stream:
                    # A kill may have left half an entry.
                    stream.truncate(stream.tell() - stream.tell() % JOURNAL_ENTRY.itemsize)
                    for row, records, mass, filled in self.model.map(
                        self._records_of, remaining.tolist()
                    ):
                        checksum = shard.write(descriptor, row, records)
                        entry = np.array([(row, checksum, mass, filled)], JOURNAL_ENTRY)
                        stream.write(entry.tobytes())
                        stream.flush()
                        written.append(entry)
                        progress.advance(1)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        everything = np.concatenate(written)
        everything = everything[np.argsort(everything["row"])]
        if filled := int(everything["filled"].sum()):
            log.warning(
                "%s: %s: at %d of %d tokens the teacher gave fewer than %d ids that the student "
                "shares; further ids have an even share of the rest",
                STEP,
                shard.name,
                filled,
                int(shard.offsets[-1]),
                self.codec.k,
            )
        info = {
            "seconds": time.monotonic() - start,
            "error": [[float(everything["mass"].sum())]],
            "filled_tokens": filled,
        }
        shard.finish(everything["checksum"].astype(np.uint32), fingerprint, info)
        journal.path.unlink()

    def _records_of(self, row: int) -> tuple[int, torch.Tensor, float, int]:
        """A row, its records [loss tokens, bytes], the mass that they leave out, summed over its
        tokens, and the number of tokens with fewer than k ids that take part.
        """
        tokens = torch.from_numpy(self.split.tokens(row).astype(np.int64))
        mask = np.asarray(self.split.loss_mask(row), bool)
        first = int(np.argmax(mask))
        ids, logs = self.model.top_log_probs(
            self.vocab.teacher_inputs(tokens).tolist(), first, self.codec.k
        )
        ids, logs = ids[mask[first:]], logs[mask[first:]]
        known = ids < len(self.student_ids)
        student_ids = self.student_ids[torch.from_numpy(np.where(known, ids, 0))]
        student_ids[~torch.from_numpy(known)] = -1
        records = self.codec.encode_top(student_ids, torch.from_numpy(logs), self.allowed)
        _, stored = self.codec.decode(records, 1.0)
        filled = int((student_ids < 0).any(-1).sum())
        return row, records, float(stored[:, -1].exp().double().sum()), filled
