"""The samples of a training, and their batches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config.loss import Writer
from pocl_ds.curriculum.micro_batches import (
    assign_by_teacher,
    assign_micro_batches,
    load_imbalance,
)
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.data.split_sources import SplitLabels
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.runtime import distributed, sequence_parallel
from pocl_ds.training.layout import Layout
from pocl_ds.training.prefetch import DeviceCopier, Prefetcher
from pocl_ds.training.request_ahead import RequestAhead, StagedBatch, TeacherRequests
from pocl_ds.training.sample_flops import SampleFlops
from pocl_ds.training.thought_weights import ThoughtWeights

# A batch made from rows of a dataset -> the same with what the teacher reads.
TeacherReader: TypeAlias = Callable[[TokenizedDataset, Batch], Batch]
Item = TypeVar("Item")


@dataclass(frozen=True)
class BatchCosts:
    """Tokens and cost of each sample of a batch, [samples]; see `curriculum.micro_batches`."""

    lengths: NDArray[np.int64]
    costs: NDArray[np.int64]


@dataclass(frozen=True)
class RankBatches:
    """One rank's micro-batches, as indices into the batch, and the teacher of each."""

    members: list[NDArray[np.int64]]
    teachers: list[int]
    load_imbalance: float  # of all ranks


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
    validation_domains: SplitLabels | None = None  # None: the samples have no domains
    teacher_requests: TeacherRequests | None = None  # for a teacher on its own ranks
    thought_weights: ThoughtWeights | None = None  # None: thoughts count as answers do
    sample_flops: SampleFlops | None = None  # what micro-batches are balanced by; None: tokens
    # Batches of training and validation may be made at once, and tokenizers are not made for that.
    _reader_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def loss_weight(self, dataset: TokenizedDataset, rows: NDArray[np.int64]) -> float:
        """The sum of the weights of all loss tokens of these samples, without their samples'
        weights: what the loss of an optimizer step is divided by.
        """
        if self.thought_weights is None:
            return int(dataset.loss_tokens[rows].sum())
        # Where nothing counts, as in unfinished thoughts of weight 0, the loss is 0.
        return self.thought_weights.total(dataset, rows) or 1.0

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

    def batch_costs(
        self,
        dataset: TokenizedDataset,
        rows: NDArray[np.int64],
        teacher_numbers: NDArray[np.int64] | None,
    ) -> BatchCosts:
        """Lengths and costs of these samples. teacher_numbers: of `TrainingModels`."""
        lengths = np.asarray(dataset.total_tokens[rows], np.int64)
        if self.sample_flops is None:
            return BatchCosts(lengths, lengths)
        loss_tokens = np.asarray(dataset.loss_tokens[rows], np.int64)
        return BatchCosts(lengths, self.sample_flops.costs(lengths, loss_tokens, teacher_numbers))

    def micro_batches(
        self, batch: BatchCosts, teachers: NDArray[np.int64] | None = None
    ) -> RankBatches:
        """This rank's micro-batches of a global batch. All ranks get the same number, and those of
        a sequence-parallel group the same ones.

        teachers: what `sample_teachers` returns.
        """
        limits: dict[str, Any] = {
            "ranks": sequence_parallel.data_parallel_size(),
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_tokens": self.micro_batch_tokens,
            "packed": self.layout.packed,
            "costs": batch.costs,
        }
        if teachers is None:
            assignment = assign_micro_batches(batch.lengths, **limits)
            teacher_of_step = [0] * len(assignment[0])
        else:
            assignment, teacher_of_step = assign_by_teacher(batch.lengths, teachers, **limits)
        return self._own_batches(assignment, teacher_of_step, batch.costs)

    def even_batches(
        self, batch: BatchCosts, teachers: NDArray[np.int64] | None = None
    ) -> RankBatches:
        """This rank's batches of any number of samples, as large as training's micro-batches; a
        rank may get empty ones, so that all ranks run the same number.
        """
        longest = int(batch.lengths.max())
        budget = self.micro_batch_tokens or self.micro_batch_size * longest
        assignment, teacher_of_step = assign_by_teacher(
            batch.lengths,
            np.zeros(len(batch.lengths), np.int64) if teachers is None else teachers,
            ranks=sequence_parallel.data_parallel_size(),
            micro_batch_size=self.micro_batch_size,
            micro_batch_tokens=max(budget, longest),
            packed=self.layout.packed,
            costs=batch.costs,
        )
        return self._own_batches(assignment, teacher_of_step, batch.costs)

    def _own_batches(
        self,
        assignment: list[list[NDArray[np.int64]]],
        teachers: list[int],
        costs: NDArray[np.int64],
    ) -> RankBatches:
        imbalance = load_imbalance(assignment, costs, packed=self.layout.packed)
        own = assignment[sequence_parallel.data_parallel_rank()]
        return RankBatches(own, teachers, imbalance)

    def batch(self, dataset: TokenizedDataset, rows: NDArray[np.int64]) -> Batch:
        """Rows of a dataset as tensors on this rank's device, complete also in a sequence-parallel
        group. Without rows the batch is one token that does not count in the loss.
        """
        return self.receive(self.stage(dataset, rows, complete=True))

    def batches(
        self,
        dataset: TokenizedDataset,
        row_groups: Sequence[NDArray[np.int64]],
        teachers: Sequence[int],
        *,
        runs_teacher: bool = True,
    ) -> Iterator[Batch]:
        """The `batch` of each group of rows and its teacher, made while earlier ones are used.

        runs_teacher: whether the caller needs the teacher's outputs.
        """
        groups = zip(row_groups, teachers, strict=True)
        prefetcher = Prefetcher(self.stage(dataset, rows, teacher) for rows, teacher in groups)
        with contextlib.closing(prefetcher):
            staged = self.request_ahead(prefetcher) if runs_teacher else prefetcher
            yield from map(self.receive, staged)

    def request_ahead(self, items: Iterator[Item]) -> Iterator[Item]:
        """Items of which some are staged batches, whose outputs are requested early if the teacher
        has its own ranks.
        """
        return RequestAhead(items, self.teacher_requests) if self.teacher_requests else items

    def stage(
        self,
        dataset: TokenizedDataset,
        rows: NDArray[np.int64],
        teacher: int = 0,
        sample_weights: NDArray[np.float32] | None = None,
        *,
        trains: bool = False,
        complete: bool = False,
    ) -> StagedBatch:
        """Make a batch, and start its copy to this rank's device; may run in another thread.

        teacher: its number. sample_weights: of the rows in the loss, [rows]. trains: whether
        thoughts have their weight. complete: make the complete batch, not the part of this rank in
        its sequence-parallel group.
        """
        batch = replace(collate(dataset, rows, packed=self.layout.packed), teacher_number=teacher)
        if sample_weights is not None:
            batch = replace(batch, sample_weights=torch.from_numpy(sample_weights))
        if trains and self.thought_weights is not None and len(rows):
            weights = [self.thought_weights.of_tokens(dataset, int(row)) for row in rows]
            batch = replace(batch, token_weights=torch.from_numpy(np.concatenate(weights)))
        if sequence_parallel.size() > 1 and not complete:
            batch = batch.sequence_shard(sequence_parallel.part(), sequence_parallel.size())
        if self.teacher_reader:
            with self._reader_lock:
                batch = self.teacher_reader(dataset, batch)
        encoded = self.teacher_requests.encode(batch) if self.teacher_requests else None
        return StagedBatch(*self._copier.start(batch), encoded)

    def receive(self, staged: StagedBatch) -> Batch:
        """The batch, which the current stream may use."""
        return self._copier.finish(staged.batch, staged.copied)

    @cached_property
    def _copier(self) -> DeviceCopier:
        return DeviceCopier(distributed.device())
