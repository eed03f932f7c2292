"""A teacher on its own ranks, as the student's ranks see it: requests for hidden states, and the
teacher's head, which is read from its checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.batches import Batch
from pocl_ds.losses.token_losses import TeacherHead
from pocl_ds.models.heads import HeadMixture, OutputHead
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers.requests import TeacherClient, encode_batch
from pocl_ds.teachers.teacher import teacher_batch


class RemoteTeacher:
    """One of the teachers that the teacher's ranks have loaded, or an ensemble of them."""

    def __init__(
        self,
        client: TeacherClient,
        number: int,
        head: OutputHead | HeadMixture,
        dtype: torch.dtype,
        vocab: VocabMap,
        loading: tuple[int, ...],
    ) -> None:
        """number: under which the teacher's ranks know it; dtype: of its hidden states; vocab: on
        the CPU; loading: see `TeacherClient.load`.
        """
        self.client, self.number, self._head, self.dtype = client, number, head, dtype
        self.vocab = vocab.to(distributed.device())
        self._host_vocab, self._loading = vocab, loading
        heads = head.heads if isinstance(head, HeadMixture) else (head,)
        self._widths = [own.width for own in heads]
        # One for each model, whose outputs are those of this model alone.
        self.members = [_Member(self, place, own) for place, own in enumerate(heads)]

    def wait_until_loaded(self) -> None:
        """Wait until the teacher's ranks have loaded it. Does nothing later."""
        loading, self._loading = self._loading, ()
        for request in loading:
            self.client.answer(request)

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`. A model can read any row."""

    def encode(self, batch: Batch) -> Tensor:
        """What the teacher reads of a batch on the CPU; may run in another thread."""
        return encode_batch(teacher_batch(batch, self._host_vocab))

    def request(self, encoded: Tensor) -> int:
        """Ask for the outputs of an encoded batch. Returns the request's number."""
        return self.client.forward(self.number, encoded, sum(self._widths), self.dtype)

    def outputs(self, batch: Batch) -> Tensor:
        """See `Teacher`. They were requested before, if the batch has the number of a request."""
        request = batch.teacher_request
        if request is None:
            request = self.request(self.encode(batch.to(torch.device("cpu"))))
        return self.client.answer(request).to(distributed.device(), non_blocking=True)

    @contextlib.contextmanager
    def head(self) -> Iterator[TeacherHead]:
        """See `Teacher`."""
        yield self._head

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of each model: [loss tokens, width]."""
        return outputs.split(self._widths, dim=-1)

    def close(self) -> None:
        """Free it on the teacher's ranks."""
        self.wait_until_loaded()
        self.client.free(self.number)


class _Member:
    """One model of a remote teacher (a `CheckedTeacher`)."""

    def __init__(self, teacher: RemoteTeacher, place: int, head: OutputHead) -> None:
        self._teacher, self._place, self._head = teacher, place, head
        self.vocab = teacher.vocab

    def outputs(self, batch: Batch) -> Tensor:
        """See `Teacher`."""
        return self._teacher.split(self._teacher.outputs(batch))[self._place]

    @contextlib.contextmanager
    def head(self) -> Iterator[OutputHead]:
        """See `Teacher`."""
        yield self._head
