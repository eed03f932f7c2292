"""SLURM's commands, each as a function: arguments in, plain values out. No shell command is built
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
# Fields of squeue by its format letters.
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
# States of jobs that neither wait nor run.
ENDED_STATES = (
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
TIMEOUT_SECONDS = 60  # a busy controller may take long to answer
# Messages of a controller that restarts.
UNREACHABLE = re.compile(
    "[Uu]nable to contact|[Tt]imed out|did not answer|Connection (refused|reset)|try again"
)
# Waits between retries: a controller that restarts is back within minutes.
RETRY_SECONDS = (5, 10, 20, 40, 60)
# The variables of SLURM that commands see. Those of a surrounding job would reach the new job: its
# memory, its task's number.
PASSED_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class QueuedJob:
    """One job, or one task of an array, in the output of squeue."""

    id: str  # 12, 12_3, or 12_[4-7] for tasks that wait together
    array: str  # id that sbatch returned
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
        """Numbers of the array's tasks in this line of squeue."""
        numbers: list[int] = []
        for part in re.sub(r"%\d+$", "", self.task).split(","):
            start, _, end = part.partition("-")
            if start.isdigit():
                numbers += range(int(start), int(end or start) + 1)
        return numbers


def available() -> bool:
    """Whether this machine has SLURM's commands."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"))


def call(*arguments: str, stdin: str | None = None) -> str:
    """Run a command of SLURM and return its output. Raises ResourceError with its error message."""
    # Hide the variables of a surrounding job, and those that override a script's options.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name in PASSED_VARIABLES
    }
    try:
        process = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            input=stdin,
            env=environment,
        )
    except FileNotFoundError:
        raise ResourceError(
            f"{arguments[0]} was not found: use a login node of a SLURM cluster, or `pocl run` here"
        ) from None
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"{arguments[0]} did not answer for {TIMEOUT_SECONDS} s: check the controller with "
            "`scontrol ping`"
        ) from None

    # Turn the error message into one line.
    if process.returncode:
        message = " ".join((process.stderr or process.stdout).split())
        raise ResourceError(
            f"{arguments[0]} failed ({message}): change the profile, or ask the cluster's admins"
        )
    return process.stdout or " ".join(process.stderr.split())  # --test-only answers on stderr


def retry_while_unreachable(command: Callable[[], str]) -> str:
    """Call a command of this module; retry for some minutes while the controller is unreachable.

    Raises:
        ResourceError: the command fails for another reason, or on the last try.
    """
    for seconds in RETRY_SECONDS:
        try:
            return command()
        except ResourceError as error:
            if not UNREACHABLE.search(str(error)):
                raise
        time.sleep(seconds)
    return command()


def submit(script: str, options: Sequence[str]) -> str:
    """Submit a script and return the job's id, from the last line: a site's sbatch may print a
    greeting first.
    """
    output = call("sbatch", "--parsable", *options, script).strip()
    number = output.rpartition("\n")[2].partition(";")[0]
    if not number.isdigit():
        raise ResourceError(
            f"sbatch --parsable printed no job id but {output!r}: ask the cluster's admins"
        )
    return number


def start_time(text: str) -> str:
    """SLURM's message when it would start a script of this text; nothing is submitted."""
    return call("sbatch", "--test-only", stdin=text)


def max_array_size() -> int | None:
    """The most tasks that an array may have; None if the controller does not say."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.M)
    return int(match[1]) if match else None


def partition(name: str | None) -> dict[str, str]:
    """The fields of a partition, by default of the cluster's default one; empty if there is none of
    that name, or several are named.
    """
    arguments = ["scontrol", "show", "partition", "--oneliner", *([name] if name else [])]
    try:
        output = call(*arguments)
    except ResourceError:  # sbatch tells which partition does not exist
        return {}
    partitions = [
        dict(word.split("=", 1) for word in line.split() if "=" in word)
        for line in output.splitlines()
    ]
    if name is None:
        partitions = [fields for fields in partitions if fields.get("Default") == "YES"]
    return partitions[0] if len(partitions) == 1 else {}


def queue(ids: Sequence[str]) -> list[QueuedJob]:
    """The lines of squeue for these jobs: those that wait or run, and those that ended recently."""
    if not ids:
        return []
    columns = SEPARATOR.join(FIELDS.values())
    try:
        output = call(
            "squeue",
            "--noheader",
            "--states=all",
            f"--jobs={','.join(ids)}",
            f"--format={columns}",
        )
    except ResourceError as error:
        if "Invalid job id" in str(error):  # all of them ended long ago
            return []
        raise
    lines = [line.split(SEPARATOR) for line in output.splitlines() if line.strip()]
    return [
        QueuedJob(*(value.strip() for value in line)) for line in lines if len(line) == len(FIELDS)
    ]


def final_states(ids: Sequence[str]) -> dict[str, str]:
    """Final states by job id from the accounting; empty on a cluster without it."""
    if not ids or not shutil.which("sacct"):
        return {}
    arguments = [
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        f"--jobs={','.join(ids)}",
        "--format=JobID,State",
    ]
    try:
        process = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {}
    lines = [line.split("|") for line in process.stdout.splitlines() if process.returncode == 0]
    return {line[0]: line[1].split()[0] for line in lines if len(line) == 2}


def live_jobs(ids: Sequence[str]) -> list[QueuedJob]:
    """The jobs that wait or run."""
    return [job for job in queue(ids) if job.state not in ENDED_STATES]


def release(ids: Sequence[str]) -> None:
    """Release held jobs."""
    if ids:
        call("scontrol", "release", *ids)


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; jobs that have ended are ignored."""
    if ids:
        call("scancel", *ids)


def add_dependency(job: str, dependency: str) -> None:
    """Make a waiting job wait for one more job to succeed."""
    text = call("scontrol", "show", "job", job)
    current = re.search(r"Dependency=(\S+)", text)
    existing = ""
    if current and current.group(1) != "(null)":
        existing = re.sub(r"\([^)]*\)", "", current.group(1))
    dependencies = ",".join(filter(None, [existing, f"afterok:{dependency}"]))
    call("scontrol", "update", f"JobId={job}", f"Dependency={dependencies}")
