"""Who answers which request of the student's ranks, and what a request says of a micro-batch."""

from __future__ import annotations

import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import FileStore

from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.errors import ResourceError
from pocl_ds.runtime.job_roles import JobRoles
from pocl_ds.teachers.requests import (
    SINGLE_TOKEN,
    Schedule,
    TeacherClient,
    TeacherService,
    decode_batch,
    encode_batch,
    loss_tokens,
)

RANKS = st.integers(1, 7)


@given(RANKS, RANKS, st.integers(0, 40))
def test_every_round_has_one_request_for_each_rank_of_the_teacher(
    students: int, teachers: int, sent: int
) -> None:
    """The teacher's ranks expect requests in the order in which the student's ranks send them."""
    schedule = Schedule(students, teachers)
    # In order of their numbers in the job: which rank of the teacher gets which student's request.
    received: list[list[int]] = [[] for _ in range(teachers)]
    for request in range(sent):
        for student in range(students):
            received[schedule.teacher_of(request, student)].append(student)
    for teacher, own in enumerate(received):
        assert own == [schedule.student_of(answered, teacher) for answered in range(len(own))]
    counts = {len(own) for own in received}
    assert max(counts, default=0) - min(counts, default=0) <= 1
    assert schedule.is_complete(sent) == (len(counts) == 1)


@given(RANKS, RANKS, st.integers(0, 40))
def test_a_request_is_answered_once_its_round_is_complete(
    students: int, teachers: int, request: int
) -> None:
    schedule = Schedule(students, teachers)
    needed = schedule.requests_for(request)
    # Rounds that so many requests of every student fill, and the one that holds the last request.
    last_round = (request * students + students - 1) // teachers
    assert needed * students // teachers > last_round
    assert (needed - 1) * students // teachers <= last_round or needed == request + 1
    # With as many requests ahead as the schedule wants, a request at a full round needs no more.
    if request * students % teachers == 0:
        assert needed <= request + 1 + schedule.requests_ahead


@given(RANKS, RANKS)
def test_copies_of_a_command_reach_every_rank_of_the_teacher_equally_often(
    students: int, teachers: int
) -> None:
    schedule = Schedule(students, teachers)
    counts = [0] * teachers
    for request in range(schedule.command_copies):
        for student in range(students):
            counts[schedule.teacher_of(request, student)] += 1
    assert counts == [schedule.received_copies] * teachers
    assert schedule.command_copies * students == math.lcm(students, teachers)


def generated(lengths: list[int], prompts: list[int]) -> GeneratedBatch:
    generator = np.random.default_rng(0)
    tokens = [generator.integers(1, 300, n).astype(np.uint32) for n in lengths]
    names = np.array([str(n) for n in range(len(lengths))], np.bytes_)
    return GeneratedBatch(np.arange(len(lengths)), names, np.array(prompts, np.int64), tokens)


@pytest.mark.parametrize("packed", [False, True])
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), max_size=4))
def test_a_batch_arrives_as_the_teacher_reads_it(
    packed: bool, sizes: list[tuple[int, int]]
) -> None:
    dataset = generated([p + n for p, n in sizes], [p for p, _ in sizes])
    batch = collate(dataset, range(len(sizes)), packed=packed)
    encoded = encode_batch(batch)
    decoded = decode_batch(encoded)
    assert loss_tokens(encoded) == len(batch.labels)
    assert decoded.lengths == batch.lengths
    for name in ("input_ids", "attention_mask", "position_ids", "positions"):
        value, expected = getattr(decoded, name), getattr(batch, name)
        assert (value is None) == (expected is None)
        if isinstance(expected, Tensor):
            assert value.dtype == expected.dtype and torch.equal(value, expected)


def test_the_request_that_fills_a_round_is_an_empty_batch() -> None:
    assert torch.equal(encode_batch(collate(generated([], []), [])), SINGLE_TOKEN)


WIDTH = 3


class Model:
    """Takes the place of a teacher: its hidden states tell the model and the tokens."""

    def __init__(self, settings: dict[str, Any], calls: list[str]) -> None:
        self.scale, self.calls = settings["scale"], calls
        self.answers: list[weakref.ref[Any]] = []
        calls.append(f"load {self.scale}")

    def outputs(self, batch: Batch) -> Tensor:
        self.calls.append(f"forward {self.scale}")
        ids = batch.input_ids.flatten()[batch.positions]
        outputs = (ids[:, None] * self.scale * torch.arange(1, WIDTH + 1)).float().numpy()
        # The service keeps no more answers than there are ranks of the student.
        self.answers.append(weakref.ref(outputs))
        assert sum(answer() is not None for answer in self.answers) <= 3 + 2
        return torch.from_numpy(outputs)

    def close(self) -> None:
        self.calls.append(f"free {self.scale}")


def student(client: TeacherClient, seed: int) -> None:
    """Ask two teachers for batches that differ between the ranks, in an order that does not."""
    own, common = np.random.default_rng(seed), np.random.default_rng(100)
    loading = [client.load(number, {"scale": number + 1}) for number in range(2)]
    pending: list[tuple[int, Tensor]] = []
    for request in (*loading[0], *loading[1]):
        client.answer(request)
    for _ in range(60):
        target = int(common.integers(0, 2))
        dataset = generated([int(own.integers(1, 6)) for _ in range(3)], [0, 1, 0])
        batch = collate(dataset, range(3))
        number = client.forward(target, encode_batch(batch), WIDTH, torch.float32)
        ids = batch.input_ids.flatten()[batch.positions]
        pending.append((number, ids[:, None] * (target + 1) * torch.arange(1, WIDTH + 1)))
        while len(pending) > common.integers(0, 4):
            number, expected = pending.pop(0)
            assert torch.equal(client.answer(number), expected.float())
    client.free(0)
    for request in client.load(2, {"scale": 7}):
        client.answer(request)
    client.forward(2, SINGLE_TOKEN, WIDTH, torch.float32)
    client.close(interrupted=True)  # with answers that nobody took


@pytest.mark.parametrize("students, teachers", [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2), (1, 3)])
def test_all_ranks_of_the_teacher_run_the_same_models_in_the_same_order(
    students: int, teachers: int, tmp_path: Path
) -> None:
    """As ZeRO-3 needs. Each rank is a thread here, and their messages are real."""
    ranks = students + teachers
    store = FileStore(str(tmp_path / "store"), ranks)
    calls: list[list[str]] = [[] for _ in range(teachers)]

    def run(rank: int) -> Any:
        roles = JobRoles(store, rank, students, teachers)
        try:
            if roles.is_teacher:
                own = calls[rank - students]
                return TeacherService(roles, lambda settings: Model(settings, own)).run()
            return student(TeacherClient(roles), rank)
        except Exception as error:
            return repr(error)  # the rank's connection ends with this function

    with ThreadPoolExecutor(ranks) as executor:
        results = list(executor.map(run, range(ranks), timeout=60))
    assert results == [None] * students + [True] * teachers
    assert all(own == calls[0] for own in calls)
    assert [call for call in calls[0] if "forward" not in call] == [
        "load 1",
        "load 2",
        "free 1",
        "load 7",
    ]
    forwards = sum("forward" in call for call in calls[0])
    assert 61 * students <= teachers * forwards  # the others fill rounds


def test_a_failure_of_the_teacher_reaches_the_student(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 2)

    def serve() -> str:
        def load(settings: dict[str, Any]) -> Model:
            raise ResourceError("no memory is left")

        try:
            TeacherService(JobRoles(store, 1, 1, 1), load).run()
        except ResourceError as error:
            return str(error)  # which ends the connection too
        return ""

    with ThreadPoolExecutor(1) as executor:
        served = executor.submit(serve)
        client = TeacherClient(JobRoles(store, 0, 1, 1))
        (request,) = client.load(0, {})
        with pytest.raises(ResourceError) as error:
            client.answer(request)
        assert served.result(timeout=30) == "no memory is left"
    assert str(error.value) == "rank 1, which runs the teacher, ended: no memory is left"
