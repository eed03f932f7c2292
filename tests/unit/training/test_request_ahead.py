"""The teacher's outputs of a micro-batch are requested before the one before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.teachers.remote import RemoteTeacher
from pocl_ds.training.request_ahead import RequestAhead, StagedBatch, TeacherRequests


class Recorder:
    """Takes the place of a teacher's ranks: what is sent to them is noted with the rest."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def request(self, encoded: torch.Tensor) -> int:
        number = int(encoded)
        self.events.append(f"request {number}")
        return number


def staged(number: int) -> StagedBatch:
    empty = np.empty(0, np.int64)
    dataset = GeneratedBatch(empty, np.empty(0, "S1"), empty, [])
    return StagedBatch(collate(dataset, []), None, torch.tensor(number))


def run(ahead: int, items: list[Any]) -> list[str]:
    recorder = Recorder()

    def made() -> Iterator[Any]:
        for item in items:
            if isinstance(item, str):
                recorder.events.append(f"make {item}")
            yield item

    def teacher_of(batch: Batch) -> RemoteTeacher:
        return cast(RemoteTeacher, recorder)

    for item in RequestAhead(made(), TeacherRequests(teacher_of, ahead)):
        is_batch = isinstance(item, StagedBatch)
        recorder.events.append(f"use {item.batch.teacher_request if is_batch else item}")
    return recorder.events


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_so_many_batches_are_requested_ahead_and_no_more(ahead: int) -> None:
    events = run(ahead, [staged(number) for number in range(6)])
    for number in range(6):
        sent = [event for event in events[: events.index(f"use {number}")] if "request" in event]
        assert sent == [f"request {n}" for n in range(min(number + ahead + 1, 6))]


def test_the_first_batch_of_the_next_step_is_requested_while_this_step_runs() -> None:
    """A plan stands between the batches of two steps; plans alone take nothing early."""
    items = ["plan 0", "plan 1", staged(0), "plan 2", staged(1), "plan 3", staged(2)]
    assert run(1, items) == [
        *("make plan 0", "use plan 0", "make plan 1", "use plan 1"),
        *("request 0", "make plan 2", "request 1", "use 0", "use plan 2"),
        *("make plan 3", "request 2", "use 1", "use plan 3", "use 2"),
    ]
