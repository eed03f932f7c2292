"""Requests from the student's ranks to a teacher on its own ranks, and the teacher's answers.

Every rank of the student sends the same sequence of requests: forwards, each with its own
micro-batch, and commands. Request number q of student rank i has the number q R + i in the job, for
R ranks of the student, and the teacher's ranks take these in turn. In each round every rank of the
teacher therefore answers one request, as ZeRO-3 needs, and both sides know from whom the next
message comes. Where a round would stay incomplete, the student's ranks fill it with forwards of a
single token.

A request is three numbers (kind, teacher, bytes) and a body; the answer to a forward is the
teacher's final hidden states at the loss tokens. Both travel between the hosts' memories.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Work

from pocl_ds.compat.torch_private import PointToPoint
from pocl_ds.data.batches import Batch
from pocl_ds.errors import PoclError, ResourceError
from pocl_ds.runtime import distributed
from pocl_ds.runtime.job_roles import FAILURE, JobRoles

HEAD, BODY, ANSWER = range(3)  # tags of messages


class Kind(IntEnum):
    """What a request asks for."""

    FORWARD = 0
    LOAD = 1  # body: the teacher as JSON
    FREE = 2
    CLOSE = 3


@dataclass(frozen=True)
class Schedule:
    """Which rank of the teacher answers which request: see the head of this file."""

    student_ranks: int
    teacher_ranks: int

    @property
    def requests_ahead(self) -> int:
        """Requests of a student's rank after the current one that keep every rank of the teacher
        at work.
        """
        return math.ceil(self.teacher_ranks / self.student_ranks)

    @property
    def command_copies(self) -> int:
        """How often each rank of the student sends a command, so that it fills whole rounds."""
        return self.teacher_ranks // math.gcd(self.student_ranks, self.teacher_ranks)

    @property
    def received_copies(self) -> int:
        """How often each rank of the teacher receives a command."""
        return self.student_ranks // math.gcd(self.student_ranks, self.teacher_ranks)

    def teacher_of(self, request: int, student: int) -> int:
        """The rank of the teacher that answers a request."""
        return (request * self.student_ranks + student) % self.teacher_ranks

    def student_of(self, answered: int, teacher: int) -> int:
        """The rank of the student that the teacher's rank serves after `answered` requests."""
        return (answered * self.teacher_ranks + teacher) % self.student_ranks

    def requests_for(self, request: int) -> int:
        """How many requests each rank of the student must have sent before request `request` of all
        its ranks is answered.
        """
        last = request * self.student_ranks + self.student_ranks - 1
        end_of_round = (last // self.teacher_ranks + 1) * self.teacher_ranks - 1
        return end_of_round // self.student_ranks + 1

    def is_complete(self, sent: int) -> bool:
        """Whether so many requests of each rank of the student end with a whole round."""
        return sent * self.student_ranks % self.teacher_ranks == 0


def encode_batch(batch: Batch) -> Tensor:
    """What a teacher reads of a batch on the CPU in its own ids, as one vector of int64: whether it
    is packed, its shape, the number of samples and of loss tokens, then the samples' lengths, the
    positions of the loss tokens and the ids.
    """
    packed = batch.lengths is not None
    if batch.lengths is not None:
        lengths = torch.tensor(batch.lengths)
    else:
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(1)
    sizes = [packed, *batch.input_ids.shape, len(lengths), len(batch.positions)]
    return torch.cat([torch.tensor(sizes), lengths, batch.positions, batch.input_ids.flatten()])


def decode_batch(values: Tensor) -> Batch:
    """The batch of `encode_batch`, without labels."""
    packed, rows, width, samples, tokens = values[:5].tolist()
    lengths, positions, ids = values[5:].split([samples, tokens, rows * width])
    columns = torch.arange(width)
    if packed:
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        position_ids, mask = (columns - starts)[None], None
    else:
        position_ids, mask = None, (columns[None] < lengths[:, None]).long()
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids=ids.view(rows, width),
        attention_mask=mask,
        position_ids=position_ids,
        lengths=tuple(lengths.tolist()) if packed else None,
        positions=positions,
        labels=nothing,
        sample_of_token=nothing,
        rows=(),
        split="",
    )


def loss_tokens(encoded: Tensor) -> int:
    """Number of loss tokens of an encoded batch."""
    return int(encoded[4])


# A padded batch of one token without a loss.
SINGLE_TOKEN = torch.tensor([0, 1, 1, 1, 0, 1, 0])


class TeacherClient:
    """A student's rank towards the teacher's ranks. All ranks of the student call every method
    together, in one thread. Requests do not wait for their answers.

    Raises ResourceError if a rank of the teacher has ended.
    """

    def __init__(self, roles: JobRoles) -> None:
        self.schedule = Schedule(roles.student_ranks, roles.teacher_ranks)
        self._roles, self._link = roles, _connect(roles)
        self._sent = 0  # requests
        self._target = 0  # teacher of the newest forward
        # To each rank of the teacher: the request, its message, and the memory that holds it.
        self._sending: dict[int, deque[tuple[int, Work, Tensor]]] = defaultdict(deque)
        self._answers: dict[int, tuple[Work | None, Tensor]] = {}

    def load(self, target: int, settings: dict[str, Any]) -> tuple[int, ...]:
        """Load a teacher under a number. Returns the requests whose answers say that it is
        loaded.
        """
        body = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)
        return self._command(Kind.LOAD, target, body)

    def free(self, target: int) -> None:
        """Free a teacher."""
        for request in self._command(Kind.FREE, target):
            self.answer(request)

    def forward(self, target: int, encoded: Tensor, width: int, dtype: torch.dtype) -> int:
        """Ask for the hidden states [loss tokens, width] of a batch of `encode_batch`. Returns the
        request's number.
        """
        # A round has forwards of one model, since ZeRO-3 gathers its layers on all ranks.
        if target != self._target:
            self._complete_round()
        self._target = target
        return self._send(Kind.FORWARD, target, encoded, (loss_tokens(encoded), width), dtype)

    def answer(self, request: int) -> Tensor:
        """Wait for the answer to a request, on the CPU. It can be taken once."""
        while self._sent < self.schedule.requests_for(request):
            self._fill_in()
        work, tensor = self._answers.pop(request)
        if work is not None:
            teacher = self._teacher_of(request)
            sending = self._sending[teacher]
            with self._failures(teacher):
                work.wait()
                # The request and those before it have arrived.
                while sending and sending[0][0] <= request:
                    sending.popleft()[1].wait()
        return tensor

    def close(self, *, interrupted: bool = False) -> None:
        """Wait for answers that were not taken, and let the teacher's ranks end. interrupted: by a
        signal, after which the job continues later.
        """
        for request in list(self._answers):
            self.answer(request)
        for request in self._command(Kind.CLOSE, int(interrupted)):
            self.answer(request)

    def _command(self, kind: Kind, target: int, body: Tensor | None = None) -> tuple[int, ...]:
        self._complete_round()
        body = torch.empty(0, dtype=torch.uint8) if body is None else body
        return tuple(
            self._send(kind, target, body, (1, 1), torch.uint8)
            for _ in range(self.schedule.command_copies)
        )

    def _complete_round(self) -> None:
        while not self.schedule.is_complete(self._sent):
            self._fill_in()

    def _fill_in(self) -> None:
        """Send a forward that completes a round. It has no answer."""
        request = self._send(Kind.FORWARD, self._target, SINGLE_TOKEN, (0, 0), torch.uint8)
        self._answers.pop(request)

    def _send(
        self, kind: Kind, target: int, body: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> int:
        """Send a request, and prepare to receive an answer of this shape. Returns its number."""
        request, self._sent = self._sent, self._sent + 1
        teacher = self._teacher_of(request)
        data = body.contiguous().view(torch.uint8)
        head = torch.tensor([kind, target, len(data)])
        with self._failures(teacher):
            for tensor, tag in ((head, HEAD), (data, BODY)):
                if len(tensor):
                    message = self._link.send(tensor, teacher, tag)
                    self._sending[teacher].append((request, message, tensor))
            answer = torch.empty(shape, dtype=dtype, pin_memory=distributed.on_gpu())
            work = None
            if answer.numel():
                work = self._link.receive(_flat_bytes(answer), teacher, ANSWER)
        self._answers[request] = work, answer
        return request

    def _teacher_of(self, request: int) -> int:
        """The rank in the job that answers a request."""
        own = self._roles.rank
        return self._roles.student_ranks + self.schedule.teacher_of(request, own)

    @contextlib.contextmanager
    def _failures(self, teacher: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = "its own log may say why"
            with contextlib.suppress(Exception):  # the store's process may be gone too
                if self._roles.store.check([FAILURE]):
                    reason = self._roles.store.get(FAILURE).decode()
            raise ResourceError(
                f"rank {teacher}, which runs the teacher, ended: {reason}"
            ) from error


class ForwardModel(Protocol):
    """A teacher that is loaded. All ranks of the teacher call every method together."""

    def outputs(self, batch: Batch) -> Tensor:
        """See `Teacher`."""

    def close(self) -> None:
        """Free it."""


class TeacherService:
    """A teacher's rank, which answers the requests of the student's ranks.

    load: loads a teacher as `TeacherClient.load` describes it. working: a block in which a request
    is answered; outside of it this rank waits for the student's.
    """

    def __init__(
        self,
        roles: JobRoles,
        load: Callable[[dict[str, Any]], ForwardModel],
        working: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.schedule = Schedule(roles.student_ranks, roles.teacher_ranks)
        self._roles, self._link = roles, _connect(roles)
        self._load, self._working = load, working
        self._teachers: dict[int, ForwardModel] = {}
        self._sending: deque[tuple[Work, Tensor]] = deque()

    def run(self) -> bool:
        """Answer requests until the student's ranks close the connection. Returns whether a signal
        interrupted them.

        Raises ResourceError if a rank of the student has ended before, and what `load` raises.
        """
        try:
            return self._answer_requests()
        except Exception as error:
            reason = str(error) if isinstance(error, PoclError) else repr(error)
            with contextlib.suppress(Exception):  # the store's process may be gone
                self._roles.store.set(FAILURE, reason)
            raise

    def _answer_requests(self) -> bool:
        own, answered, closing = self._roles.rank - self._roles.student_ranks, 0, 0
        interrupted = False
        while closing < self.schedule.received_copies:
            student = self.schedule.student_of(answered, own)
            kind, target, body = self._receive(student)
            with self._working():
                answer = self._answer(kind, target, body)
            if kind == Kind.CLOSE:
                closing, interrupted = closing + 1, bool(target)
            self._send(answer, student)
            answered += 1
        for work, _ in self._sending:
            work.wait()
        return interrupted

    def _answer(self, kind: Kind, target: int, body: Tensor) -> Tensor:
        """The answer to a request. Commands come several times, and their answer says nothing."""
        if kind == Kind.FORWARD:
            batch = decode_batch(body.view(torch.int64)).to(distributed.device())
            return self._teachers[target].outputs(batch).cpu()
        if kind == Kind.LOAD and target not in self._teachers:
            with distributed.raise_on_all_ranks("load the teacher"):
                self._teachers[target] = self._load(json.loads(body.numpy().tobytes()))
        elif kind == Kind.FREE and target in self._teachers:
            self._teachers.pop(target).close()
        return torch.empty(1, 1, dtype=torch.uint8)

    def _receive(self, student: int) -> tuple[Kind, int, Tensor]:
        with _student_failures(student):
            head = torch.empty(3, dtype=torch.int64)
            self._link.receive(head, student, HEAD).wait()
            kind, target, size = head.tolist()
            body = torch.empty(size, dtype=torch.uint8)
            if size:
                self._link.receive(body, student, BODY).wait()
        return Kind(kind), target, body

    def _send(self, answer: Tensor, student: int) -> None:
        if answer.numel():
            data = _flat_bytes(answer.contiguous())
            with _student_failures(student):
                self._sending.append((self._link.send(data, student, ANSWER), data))
                # Students receive without being asked: wait only to bound the memory.
                while len(self._sending) > self._roles.student_ranks:
                    self._sending.popleft()[0].wait()


def _connect(roles: JobRoles) -> PointToPoint:
    """Connections of all processes of the job, which call it together."""
    return PointToPoint(
        PrefixStore("requests", roles.store),
        roles.rank,
        roles.student_ranks + roles.teacher_ranks,
        distributed.set_process_group_timeout(),
    )


def _flat_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


@contextlib.contextmanager
def _student_failures(student: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ResourceError(
            f"rank {student}, one of the student's, ended, so the teacher's ranks stop: its own "
            "message says why"
        ) from error
