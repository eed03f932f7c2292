"""Micro-batches whose teacher runs on its own ranks: their outputs are requested before earlier
micro-batches are used, so that teacher and student work at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pocl_ds.data.batches import Batch
from pocl_ds.teachers.remote import RemoteTeacher

Item = TypeVar("Item")


@dataclass(frozen=True)
class StagedBatch:
    """A batch whose copy to the device has started, and the event after which it is complete.

    encoded: what a teacher on its own ranks reads of it.
    """

    batch: Batch
    copied: torch.cuda.Event | None
    encoded: Tensor | None = None


@dataclass(frozen=True)
class TeacherRequests:
    """How micro-batches are sent to a teacher on its own ranks.

    teacher_of: the teacher of a micro-batch. ahead: micro-batches after the current one whose
    outputs are requested.
    """

    teacher_of: Callable[[Batch], RemoteTeacher]
    ahead: int

    def encode(self, batch: Batch) -> Tensor:
        """What the teacher reads of a batch on the CPU; may run in another thread."""
        return self.teacher_of(batch).encode(batch)

    def send(self, staged: StagedBatch) -> StagedBatch:
        """Request the outputs of a batch."""
        assert staged.encoded is not None
        number = self.teacher_of(staged.batch).request(staged.encoded)
        return replace(staged, batch=replace(staged.batch, teacher_request=number), encoded=None)


class RequestAhead(Generic[Item]):
    """The items of an iterator in their order, some of them staged batches. When a batch is taken,
    the outputs of the `requests.ahead` batches after it are requested too.

    All ranks of the student take items together.
    """

    def __init__(self, items: Iterator[Item], requests: TeacherRequests) -> None:
        self._items, self._requests = items, requests
        self._taken: deque[Any] = deque()
        self._batches = 0  # among them

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self._taken and not self._take():
            raise StopIteration
        if isinstance(self._taken[0], StagedBatch):
            while self._batches <= self._requests.ahead and self._take():
                pass
            self._batches -= 1
        item: Item = self._taken.popleft()
        return item

    def _take(self) -> bool:
        """Take the next item, and request the outputs of a batch; False at the end."""
        item = next(self._items, None)
        if item is None:
            return False
        if isinstance(item, StagedBatch):
            self._taken.append(self._requests.send(item))
            self._batches += 1
        else:
            self._taken.append(item)
        return True
