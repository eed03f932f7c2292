"""The samples of a training, and their batches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config.loss import Writer
from pocl_ds.curriculum.micro_batches import assign_by_teacher, assign_micro_batches
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.runtime import distributed
from pocl_ds.training.layout import Layout
from pocl_ds.training.prefetch import DeviceCopier, Prefetcher

# A batch made from rows of a dataset -> the same with what the teacher reads.
TeacherReader: TypeAlias = Callable[[TokenizedDataset, Batch], Batch]


@dataclass(frozen=True)
class StagedBatch:
    """A batch whose copy to the device has started, and the event after which it is complete."""

    batch: Batch
    copied: torch.cuda.Event | None


@dataclass
class TrainingData:
    """Training and validation samples."""

    train: TokenizedSplit
    validation: TokenizedSplit | None
    layout: Layout
    micro_batch_size: int
    micro_batch_tokens: int | None = None  # replaces micro_batch_size
    # Adds what the teacher reads, for one with another tokenizer, with its own prompts, or cached.
    teacher_reader: TeacherReader | None = None
    # The training samples with the teacher's responses, if the policy uses them.
    teacher_responses: TokenizedSplit | None = None
    # The teacher of each row of a split, if domains have their own: split -> [samples].
    teacher_of_row: Mapping[str, NDArray[np.int64]] | None = None
    # Batches of training and validation may be made at once, and tokenizers are not made for that.
    _reader_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def writer_of(self, dataset: TokenizedDataset) -> Writer:
        """Who wrote the responses of a dataset that a policy selected."""
        if dataset is self.train:
            return "data"
        return "teacher" if dataset is self.teacher_responses else "student"

    def sample_teachers(
        self, dataset: TokenizedDataset, rows: NDArray[np.int64]
    ) -> NDArray[np.int64] | None:
        """Number of the teacher of each of these samples; None unless domains have their own."""
        if self.teacher_of_row is None:
            return None
        places = [dataset.prompt_source(int(row)) for row in rows]
        return np.array([self.teacher_of_row[split][row] for split, row in places], np.int64)

    def micro_batches(
        self, lengths: NDArray[np.int64], teachers: NDArray[np.int64] | None = None
    ) -> tuple[list[NDArray[np.int64]], list[int]]:
        """This rank's micro-batches of a global batch with these lengths in tokens, as indices into
        the batch, and the teacher of each. All ranks get the same number.

        teachers: what `sample_teachers` returns.
        """
        limits: dict[str, Any] = {
            "ranks": distributed.world_size(),
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_tokens": self.micro_batch_tokens,
            "packed": self.layout.packed,
        }
        if teachers is None:
            own = assign_micro_batches(lengths, **limits)[distributed.rank()]
            return own, [0] * len(own)
        assignment, teacher_of_step = assign_by_teacher(lengths, teachers, **limits)
        return assignment[distributed.rank()], teacher_of_step

    def even_batches(
        self, lengths: NDArray[np.int64], teachers: NDArray[np.int64] | None = None
    ) -> tuple[list[NDArray[np.int64]], list[int]]:
        """This rank's batches of any number of samples, as large as training's micro-batches, and
        the teacher of each; a rank may get empty ones, so that all ranks run the same number.
        """
        longest = int(lengths.max())
        budget = self.micro_batch_tokens or self.micro_batch_size * longest
        assignment, teacher_of_step = assign_by_teacher(
            lengths,
            np.zeros(len(lengths), np.int64) if teachers is None else teachers,
            ranks=distributed.world_size(),
            micro_batch_size=self.micro_batch_size,
            micro_batch_tokens=max(budget, longest),
            packed=self.layout.packed,
        )
        return assignment[distributed.rank()], teacher_of_step

    def batch(self, dataset: TokenizedDataset, rows: NDArray[np.int64]) -> Batch:
        """Rows of a dataset as tensors on this rank's device. Without rows the batch is one token
        that does not count in the loss.
        """
        return self.receive(self.stage(dataset, rows))

    def batches(
        self,
        dataset: TokenizedDataset,
        row_groups: Sequence[NDArray[np.int64]],
        teachers: Sequence[int],
    ) -> Iterator[Batch]:
        """The `batch` of each group of rows and its teacher, made while earlier ones are used."""
        groups = zip(row_groups, teachers, strict=True)
        prefetcher = Prefetcher(self.stage(dataset, rows, teacher) for rows, teacher in groups)
        with contextlib.closing(prefetcher):
            yield from map(self.receive, prefetcher)

    def stage(
        self,
        dataset: TokenizedDataset,
        rows: NDArray[np.int64],
        teacher: int = 0,
        sample_weights: NDArray[np.float32] | None = None,
    ) -> StagedBatch:
        """Make a batch, and start its copy to this rank's device; may run in another thread.

        teacher: its number. sample_weights: of the rows in the loss, [rows].
        """
        batch = replace(collate(dataset, rows, packed=self.layout.packed), teacher_number=teacher)
        if sample_weights is not None:
            batch = replace(batch, sample_weights=torch.from_numpy(sample_weights))
        if self.teacher_reader:
            with self._reader_lock:
                batch = self.teacher_reader(dataset, batch)
        return StagedBatch(*self._copier.start(batch))

    def receive(self, staged: StagedBatch) -> Batch:
        """The batch, which the current stream may use."""
        return self._copier.finish(staged.batch, staged.copied)

    @cached_property
    def _copier(self) -> DeviceCopier:
        return DeviceCopier(distributed.device())
