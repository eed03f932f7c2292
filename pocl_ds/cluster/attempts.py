"""Attempts of a job, and what to do after one: pure rules over a file a job, on the standard
library alone.

A job that was asked to stop, or lost its node, goes on by itself as long as it gets further; one
whose nodes SLURM took for another, whenever it gets nodes again. A crash is tried again once; the
same error at the same place is a defect that no restart mends.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path

from pocl_ds.errors import RESUME, UNFIT

DONE, AGAIN, FAILED, ENDED = "done", "again", "failed", "ended"
MENDABLE = 2
PREEMPTED = "preemption"
VARYING = re.compile(
    r"0x[0-9a-f]+|\d{2}:\d{2}:\d{2}(\.\d+)?|\b\d{4}-\d{2}-\d{2}\b|\bpid \d+|\d+ "
    r"milliseconds|:\d{4,5}\b",
    re.IGNORECASE,
)


@dataclass
class Attempt:
    """One start of a job on its nodes. `end` is None while it runs, and for ever where the node
    died under it.
    """

    number: int
    job: str
    nodes: list[str] = field(default_factory=list)
    start: float = 0.0
    end: float | None = None
    code: int | None = None
    # steps or pieces that were finished when it ended; when it began, where it did not end by
    # itself
    progress: int = 0
    error: str = ""
    stopped: str = ""  # why it was asked to stop: a signal's name, or preemption
    suspects: list[str] = field(default_factory=list)  # nodes that were found unfit
    outcome: str = ""
    why: str = ""

    @property
    def counts(self) -> bool:
        """Whether it speaks about the job. Where SLURM took its nodes (preempted, requeued by
        somebody) it does not: an array's task has no steps to show for its time, and may be
        preempted often before it is done once.
        """
        ended_while_it_left = self.end is None and self.stopped == "SIGTERM"
        return self.stopped != PREEMPTED and self.outcome != ENDED and not ended_while_it_left


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job after an attempt."""

    outcome: str
    why: str


def signature(error: str) -> str:
    """An error without what differs from one time to the next: addresses, clock times, ports."""
    return VARYING.sub("#", error).strip()


def judge(before: Sequence[Attempt], last: Attempt, *, most: int, taken: bool = False) -> Verdict:
    """What to do after `last`, the attempts before it in order.

    most: attempts in a row without progress; those whose nodes SLURM took are not among them.
    taken: SLURM is ending the job.
    """
    if last.code == 0:
        return Verdict(DONE, "finished")
    if last.code == MENDABLE:
        return Verdict(FAILED, last.error or "a fault in the recipe or its files: see the log")
    asked = last.code in (RESUME, UNFIT) or bool(last.stopped)
    if not asked:
        same = [
            a
            for a in before
            if a.end is not None
            and not a.stopped
            and a.code not in (0, RESUME)
            and a.progress == last.progress
            and signature(a.error) == signature(last.error)
        ]
        if same:
            return Verdict(
                FAILED,
                f"the same error at the same place as in attempt {same[-1].number}: {last.error}",
            )
    what = last.error or (
        f"stopped by {last.stopped or 'a signal'}" if asked else f"exit code {last.code}"
    )
    if taken:
        return Verdict(ENDED, f"{what}; SLURM itself ends or requeues the job")
    since = list(takewhile(lambda attempt: last.progress <= attempt.progress, reversed(before)))
    stalled = sum(attempt.counts for attempt in [last, *since])
    if last.counts and stalled >= most:
        return Verdict(
            FAILED,
            f"{stalled} attempts without progress (profile field attempts={most}); the last one: "
            f"{what}",
        )
    if last.code == UNFIT:
        return Verdict(AGAIN, f"{what}; it goes to other nodes")
    return Verdict(AGAIN, f"{what}; {'it goes on' if asked else 'one more attempt'}")


def excluded(attempts: Sequence[Attempt]) -> list[str]:
    """Nodes that a job keeps away from: unfit ones, and those of one-node attempts that ended
    without a word twice, unasked.
    """
    found = {node for attempt in attempts for node in attempt.suspects}
    lost = [a.nodes[0] for a in attempts if a.end is None and not a.stopped and len(a.nodes) == 1]
    return sorted(found | {node for node in lost if lost.count(node) > 1})


def read_attempts(path: Path) -> list[Attempt]:
    """The attempts of a job, in order; a torn last line is left out."""
    found: dict[int, Attempt] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            attempt = Attempt(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        found[attempt.number] = attempt
    return [found[number] for number in sorted(found)]


def write_attempt(path: Path, attempt: Attempt) -> None:
    """Append what is known of an attempt; the newest line of a number counts. A line that was torn,
    as by a full disk, takes none of the next ones with it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        torn = b""
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            torn = b"" if stream.read() == b"\n" else b"\n"
        stream.write(torn + json.dumps(asdict(attempt)).encode() + b"\n")
