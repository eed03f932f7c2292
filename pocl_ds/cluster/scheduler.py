"""SLURM's own commands, each behind a function: words in, plain values out. No shell is ever built
from strings.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocl_ds.errors import ResourceError

SEPARATOR = "\x1f"
FIELDS = {
    "id": "%i",
    "array": "%F",
    "task": "%K",
    "name": "%j",
    "state": "%T",
    "reason": "%r",
    "start": "%S",
    "used": "%M",
    "limit": "%l",
    "nodes": "%N",
    "since": "%V",
}
GONE = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
SECONDS = 60  # a controller that is busy may take long to answer
AWAY = re.compile(
    "[Uu]nable to contact|[Tt]imed out|did not answer|Connection (refused|reset)|try again"
)
AWAY_SECONDS = (
    5,
    10,
    20,
    40,
    60,
)  # between trials: a controller that restarts is back within minutes
# What a surrounding job would tell sbatch, and through it the new one's srun: its memory, its
# task's number.
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class Queued:
    """One job, or one task of an array, that the scheduler knows of."""

    id: str  # 12, 12_3, or 12_[4-7] for tasks that wait together
    array: str  # the id that sbatch gave
    task: str  # of an array: 3 or 4-7; else N/A
    name: str
    state: str
    reason: str
    start: str
    used: str
    limit: str
    nodes: str
    since: str

    @property
    def tasks(self) -> list[int]:
        """Numbers of the array's tasks that this line stands for."""
        found: list[int] = []
        for part in re.sub(r"%\d+$", "", self.task).split(","):
            first, _, last = part.partition("-")
            if first.isdigit():
                found += range(int(first), int(last or first) + 1)
        return found


def available() -> bool:
    """Whether this machine has SLURM's commands."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"))


def call(*words: str, given: str | None = None) -> str:
    """Run a command of SLURM, `given` on its input. Raises ResourceError with what it said."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in KEPT
    }
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=SECONDS, input=given, env=own
        )
    except FileNotFoundError:
        raise ResourceError(
            f"{words[0]} was not found: use a machine that submits to SLURM, or run `pocl run` here"
        ) from None
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"{words[0]} did not answer for {SECONDS} s: is the controller up (scontrol ping)?"
        ) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise ResourceError(
            f"{words[0]} refused ({said}): change the profile, or ask those who run the cluster"
        )
    return done.stdout or " ".join(done.stderr.split())  # --test-only answers on stderr


def patiently(ask: Callable[[], str]) -> str:
    """What `ask` returns, asked again where the controller is away for some minutes. Raises
    ResourceError.
    """
    for seconds in AWAY_SECONDS:
        try:
            return ask()
        except ResourceError as error:
            if not AWAY.search(str(error)):
                raise
        time.sleep(seconds)
    return ask()


def submit(script: str, options: Sequence[str]) -> str:
    """Submit a script. Returns the job's id: the last line, since a site's own sbatch may greet
    first.
    """
    said = call("sbatch", "--parsable", *options, script).strip()
    number = said.rpartition("\n")[2].partition(";")[0]
    if not number.isdigit():
        raise ResourceError(
            f"sbatch --parsable gave no job id but {said!r}: ask those who run the cluster"
        )
    return number


def start_time(text: str) -> str:
    """When the scheduler would start a script of this text, in its own words; nothing is submitted."""
    return call("sbatch", "--test-only", given=text)


def queue(ids: Sequence[str]) -> list[Queued]:
    """What the scheduler says of these jobs: those that wait and run, and those that ended lately."""
    if not ids:
        return []
    form = SEPARATOR.join(FIELDS.values())
    try:
        said = call(
            "squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", f"--format={form}"
        )
    except ResourceError as error:
        if "Invalid job id" in str(error):  # all of them ended long ago
            return []
        raise
    lines = [line.split(SEPARATOR) for line in said.splitlines() if line.strip()]
    return [
        Queued(*(value.strip() for value in line)) for line in lines if len(line) == len(FIELDS)
    ]


def accounted(ids: Sequence[str]) -> dict[str, str]:
    """Final states by job id from the accounting, {} on a cluster without it."""
    if not ids or not shutil.which("sacct"):
        return {}
    words = [
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        f"--jobs={','.join(ids)}",
        "--format=JobID,State",
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {}
    lines = [line.split("|") for line in done.stdout.splitlines() if done.returncode == 0]
    return {line[0]: line[1].split()[0] for line in lines if len(line) == 2}


def live(ids: Sequence[str]) -> list[Queued]:
    """Those of the jobs that wait or run."""
    return [job for job in queue(ids) if job.state not in GONE]


def release(ids: Sequence[str]) -> None:
    """Let held jobs go."""
    if ids:
        call("scontrol", "release", *ids)


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that ended are passed over."""
    if ids:
        call("scancel", *ids)
