"""Attempts of a job, and the decision after each one. Pure functions over one file per job; only
the standard library.

A job that got a stop signal or lost its node is requeued as long as it makes progress; a preempted
job is always requeued. A crash is retried once: the same error at the same optimizer step is a bug
that a restart does not fix.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path

from pocl_ds.errors import EXIT_RESUME, EXIT_UNFIT_NODE

# Outcomes of an attempt. ENDED: SLURM itself cancels or requeues the job.
DONE, RETRY, FAILED, ENDED = "done", "retry", "failed", "ended"
USER_ERROR = 2  # exit code of a fault that only the user can fix
PREEMPTED = "preemption"
# Why a job had to stop, in words. Its script asks SLURM for USR2 before the time limit.
STOP_REASONS = {
    "": "stopped by a signal",
    "SIGUSR2": "stopped since its time limit is near",
    PREEMPTED: "preempted",
}
# Parts of an error message that differ from one attempt to the next.
VARYING = re.compile(
    r"0x[0-9a-f]+|\d{2}:\d{2}:\d{2}(\.\d+)?|\b\d{4}-\d{2}-\d{2}\b|\bpid \d+|\d+ "
    r"milliseconds|:\d{4,5}\b",
    re.IGNORECASE,
)


@dataclass
class Attempt:
    """One start of a job on its nodes."""

    number: int
    job: str
    nodes: list[str] = field(default_factory=list)
    start: float = 0.0
    end: float | None = None  # None while it runs, and forever if its node died
    code: int | None = None
    # Optimizer steps recorded by its end; by its start if its end is unknown.
    progress: int = 0
    error: str = ""
    stop_reason: str = ""  # why the job had to stop: a signal's name, or preemption
    unfit_nodes: list[str] = field(default_factory=list)
    outcome: str = ""
    reason: str = ""  # of the outcome

    @property
    def counts_against_job(self) -> bool:
        """Whether it counts as an attempt without progress.

        It does not if SLURM took the nodes (by preemption or requeue): a task of an array records
        no optimizer steps, and may be preempted often before it finishes once.
        """
        killed_while_stopping = self.end is None and self.stop_reason == "SIGTERM"
        return self.stop_reason != PREEMPTED and self.outcome != ENDED and not killed_while_stopping


@dataclass(frozen=True)
class Decision:
    """What happens to a job after an attempt."""

    outcome: str
    reason: str


def error_signature(error: str) -> str:
    """An error message without addresses, times, process ids and ports."""
    return VARYING.sub("#", error).strip()


def decide(
    previous: Sequence[Attempt],
    attempt: Attempt,
    *,
    max_attempts: int,
    ended_by_slurm: bool = False,
) -> Decision:
    """Decide what happens after an attempt.

    previous: the attempts before it, in order. max_attempts: attempts in a row without progress
    before the job fails; attempts whose nodes SLURM took do not count. ended_by_slurm: whether
    SLURM is cancelling or requeueing the job.
    """
    if attempt.code == 0:
        return Decision(DONE, "finished")
    if attempt.code == USER_ERROR:
        fallback = "the recipe or one of its files has an error: see the log"
        return Decision(FAILED, attempt.error or fallback)

    # A crash with the same error at the same place as before is not retried.
    was_stopped = attempt.code in (EXIT_RESUME, EXIT_UNFIT_NODE) or bool(attempt.stop_reason)
    repeated = [
        other
        for other in previous
        if other.end is not None
        and not other.stop_reason
        and other.code not in (0, EXIT_RESUME)
        and other.progress == attempt.progress
        and error_signature(other.error) == error_signature(attempt.error)
    ]
    if not was_stopped and repeated:
        return Decision(
            FAILED,
            f"the same error at the same place as in attempt {repeated[-1].number}: "
            f"{attempt.error}",
        )
    cause = attempt.error or f"exit code {attempt.code}"
    if was_stopped and not attempt.error:
        cause = STOP_REASONS.get(attempt.stop_reason, f"stopped by {attempt.stop_reason}")
    if ended_by_slurm:
        return Decision(ENDED, f"{cause}; SLURM itself ends or requeues the job")

    # A job without progress is given up after max_attempts.
    stalled = list(takewhile(lambda a: attempt.progress <= a.progress, reversed(previous)))
    count = sum(other.counts_against_job for other in [attempt, *stalled])
    if attempt.counts_against_job and count >= max_attempts:
        return Decision(
            FAILED,
            f"{count} attempts without progress (profile field attempts={max_attempts}); the last "
            f"one: {cause}",
        )
    if attempt.code == EXIT_UNFIT_NODE:
        return Decision(RETRY, f"{cause}; the job moves to other nodes")
    return Decision(
        RETRY, f"{cause}; the job {'continues' if was_stopped else 'gets one more attempt'}"
    )


def excluded_nodes(attempts: Sequence[Attempt]) -> list[str]:
    """Nodes that a job avoids: unfit ones, and nodes on which one-node attempts ended twice without
    a record and without a stop signal.
    """
    unfit = {node for attempt in attempts for node in attempt.unfit_nodes}
    lost = [
        attempt.nodes[0]
        for attempt in attempts
        if attempt.end is None and not attempt.stop_reason and len(attempt.nodes) == 1
    ]
    return sorted(unfit | {node for node in lost if lost.count(node) > 1})


def read_attempts(path: Path) -> list[Attempt]:
    """The attempts of a job, in order. The newest line of a number counts; torn lines are
    ignored.
    """
    attempts: dict[int, Attempt] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            attempt = Attempt(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        attempts[attempt.number] = attempt
    return [attempts[number] for number in sorted(attempts)]


def write_attempt(path: Path, attempt: Attempt) -> None:
    """Append what is known of an attempt. It starts a new line if the last one is torn, for example
    by a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        separator = b""
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            separator = b"" if stream.read() == b"\n" else b"\n"
        stream.write(separator + json.dumps(asdict(attempt)).encode() + b"\n")
