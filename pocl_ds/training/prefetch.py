"""Micro-batches that are made while the device computes: in a background thread, and on a GPU
copied through pinned memory on a stream of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pocl_ds.data.batches import Batch

DEPTH = 2  # items that are made before they are asked for

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """The items of an iterable in their order, each made in one background thread while earlier
    ones are used.

    An error of the iterable is raised when its item is asked for. `close` waits until the item
    that is being made is finished, and ends the thread.
    """

    def __init__(self, items: Iterable[Item], *, depth: int = DEPTH) -> None:
        self._items = iter(items)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: deque[Future[list[Item]]] = deque()
        for _ in range(depth):
            self._request()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self._pending:
            raise StopIteration
        item = self._pending.popleft().result()
        if not item:
            self.close()
            raise StopIteration
        self._request()
        return item[0]

    def close(self) -> None:
        """End the thread; items that were not asked for are lost."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _request(self) -> None:
        """Ask for one more item; the result is empty after the last one."""
        self._pending.append(self._executor.submit(lambda: list(islice(self._items, 1))))


class DeviceCopier:
    """Copies batches to a device. On a GPU the copy runs beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
        """Start copying a batch; may run in another thread. Returns the copy, and an event after
        which it is complete.
        """
        if self.stream is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self.stream):
            copy = batch.map_tensors(Tensor.pin_memory).to(self.device)
            return copy, self.stream.record_event()

    def finish(self, batch: Batch, copied: torch.cuda.Event | None) -> Batch:
        """Let the current stream wait for a copy. Its memory is not reused before that stream has
        used it.
        """
        if copied is None:
            return batch
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)

        def record_use(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        return batch.map_tensors(record_use)
