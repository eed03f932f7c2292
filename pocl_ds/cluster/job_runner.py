"""The program that a job's script runs on its first node: each command of the job in one srun, then
the decision whether the job requeues itself, moves to other nodes, or fails.

    python launch/pocl.py pocl_ds.cluster.job_runner RUN NAME

It forwards SLURM's signals to the ranks and records each attempt. It imports only the standard
library, so that its signal handlers are installed a moment after the job started.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocl_ds.cluster import job_state, scheduler
from pocl_ds.cluster.attempts import (
    DONE,
    FAILED,
    PREEMPTED,
    RETRY,
    USER_ERROR,
    Attempt,
    decide,
    excluded_nodes,
    read_attempts,
    write_attempt,
)
from pocl_ds.cluster.containers import import_image
from pocl_ds.cluster.srun import srun_command
from pocl_ds.errors import (
    EXIT_HANG,
    EXIT_RESUME,
    EXIT_UNFIT_NODE,
    LOST_RANK,
    PoclError,
    ResourceError,
)
from pocl_ds.runtime.process_exit import EXIT_RECORDS, SIGNALS, read_exit_records
from pocl_ds.workflow.locks import LockTakenError, hold_lock

# A rank that was not ready for the signal to stop gets it again after this time.
REPEAT_SIGNAL_SECONDS = 10.0
METRICS = {"init-student": "models/heal", "train": "train", "baseline": "baseline"}
TAIL_LINES = 12  # of a failing rank's log


def print_line(text: str) -> None:
    """Print a line with the time to the job's own log; a full disk is ignored."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Job:
    """One attempt of a job, or of one task of an array."""

    def __init__(self, run: Path, name: str) -> None:
        self.run, self.folder = run, run / "cluster"
        self.spec: dict[str, Any] = json.loads((self.folder / "jobs" / f"{name}.json").read_text())
        # SLURM_JOB_ID is ambiguous in an array: the last task has the id of the whole array.
        self.task = os.environ.get("SLURM_ARRAY_TASK_ID")
        array_id = f"{os.environ.get('SLURM_ARRAY_JOB_ID')}_{self.task}"
        self.id = os.environ["SLURM_JOB_ID"] if self.task is None else array_id
        self.label = name if self.task is None else f"{name}-{self.task}"
        self.file = self.folder / "attempts" / f"{self.label}.jsonl"
        self.previous = read_attempts(self.file)
        nodes = scheduler.call(
            "scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]
        ).split()
        self.attempt = Attempt(
            len(self.previous) + 1, self.id, nodes, time.time(), progress=progress(run, name)
        )
        self.exits = self.folder / "exits" / f"{self.label}-a{self.attempt.number}"
        self.logs = ""  # pattern of the running command's logs, one file a rank
        self.child: subprocess.Popen[bytes] | None = None
        self.signalled = 0.0  # when the running command last got the signal to stop

    def stop(self, number: int, _frame: Any) -> None:
        """Handle a signal to the batch shell: the ranks finish their optimizer step, save, and
        exit.
        """
        self.attempt.stop_reason = self.attempt.stop_reason or signal.Signals(number).name
        self._signal_ranks()

    def _signal_ranks(self) -> None:
        if self.child and self.child.poll() is None:
            self.signalled = time.monotonic()
            self.child.send_signal(signal.SIGUSR2)  # srun would kill the ranks on SIGTERM

    def execute(self) -> int:
        """Run every command in order, then decide what follows. Returns the job's exit code."""
        print_line(
            f"{self.label}: attempt {self.attempt.number} as job {self.id} on "
            f"{', '.join(self.attempt.nodes)}"
        )
        self._record()
        if unfit := sorted(set(excluded_nodes(self.previous)) & set(self.attempt.nodes)):
            self.attempt.code = EXIT_UNFIT_NODE
            self.attempt.error = f"{', '.join(unfit)} failed this job before"
        else:
            self.attempt.code = self._run_commands()
        return self._conclude()

    def _record(self) -> None:
        """Write what is known of this attempt; a full disk does not end the attempt."""
        try:
            write_attempt(self.file, self.attempt)
        except OSError as error:
            print_line(
                f"{self.label}: {self.file} cannot be written ({error.strerror}): `pocl status` "
                "will not show this attempt"
            )

    def _run_commands(self) -> int:
        """Run the preflight and the job's commands until one fails. Returns its exit code, or 0."""
        if container := self.spec["container"]:
            try:
                container["image"] = import_image(container, self.folder / "images")
            except PoclError as error:
                self.attempt.error = str(error)
                return 1
        commands: list[tuple[list[str], list[str], bool]] = []
        if self.spec["preflight"]:
            commands.append((["--module", "pocl_ds.cluster.preflight"], [self.spec["name"]], True))
        for number, command in enumerate(self.spec["commands"]):
            is_last = number + 1 == len(self.spec["commands"])
            array = self.spec["array"]
            task_arguments = array[int(self.task or 0)] if array and is_last else []
            commands.append(([], [*command["arguments"], *task_arguments], command["ranks"]))
        for number, (options, arguments, ranks) in enumerate(commands):
            if self.attempt.stop_reason:
                return EXIT_RESUME
            tasks_per_node = self.spec["tasks_per_node"] if ranks else 0
            if code := self._run_command(number, options, arguments, tasks_per_node):
                return code
        return 0

    def _run_command(
        self, number: int, options: list[str], arguments: list[str], tasks_per_node: int
    ) -> int:
        """Run one command by srun, on all tasks of the job, or on one task if tasks_per_node is 0.
        Returns its exit code and sets the attempt's error.
        """
        nodes, per_node = (self.spec["nodes"], tasks_per_node) if tasks_per_node else (1, 1)
        ranks = nodes * per_node
        exits = self.exits / str(number)
        # The attempt's number is part of the log's name: a later attempt never overwrites it.
        name = "preflight" if options else arguments[0]
        self.logs = f"{self.run}/logs/{self.label}-a{self.attempt.number}-{name}-rank-%t.log"
        launcher = ["bash", f"{self.folder}/code/launch/train.sh", *options, *arguments]
        command = [
            *srun_command(self.spec, self.run, nodes, per_node, self.logs),
            *launcher,
            "--run-dir",
            str(self.run),
        ]
        print_line(f"{self.label}: {name} on {ranks} rank{'s' if ranks > 1 else ''}")
        self.child = subprocess.Popen(command, env=self._environment(exits, nodes))
        if self.attempt.stop_reason:  # the signal came before the child was known
            self._signal_ranks()
        code = self._wait(self.child)

        # Nodes without a single record in the preflight are unfit. If a rank failed, however, srun
        # has killed the other ranks, and a missing record proves nothing.
        records = read_exit_records(exits)
        if name == "preflight" and code and not self.attempt.stop_reason:
            silent = sorted(set(self.attempt.nodes) - {record["node"] for record in records})
            waited = all(record["code"] in (0, EXIT_HANG) for record in records)
            if records and silent and waited:
                self.attempt.error = f"preflight: {', '.join(silent)}: none of its ranks answered"
                self.attempt.unfit_nodes = silent
                return EXIT_UNFIT_NODE
        return self._explain(code, records, ranks)

    def _environment(self, exits: Path, nodes: int) -> dict[str, str]:
        """Environment variables of a command's ranks."""
        container = self.spec["container"] or {}
        environment = {
            **os.environ,
            EXIT_RECORDS: str(exits),
            "POCL_WITHIN": "1",
            "POCL_PYTHON": container.get("python") or self.spec["python"],
            # Set here, since an image may lack scontrol.
            "MASTER_ADDR": self.attempt.nodes[0] if nodes > 1 else "127.0.0.1",
        }
        environment.pop("MASTER_PORT", None)  # the submitting shell's belongs to another run
        if self.spec["gpus_per_node"]:  # no node may run as one without GPUs
            environment["POCL_GPUS"] = str(self.spec["gpus_per_node"])
        return environment

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Wait for a command's end; record a stop signal early, since SLURM may kill the
        job before its end. Returns the exit code.
        """
        recorded = ""
        while True:
            try:
                code = child.wait(timeout=1.0)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                pass
            if self.attempt.stop_reason != recorded:
                if job_state.preempted(self.id):
                    self.attempt.stop_reason = PREEMPTED
                recorded = self.attempt.stop_reason
                self._record()
            waited = time.monotonic() - self.signalled
            if self.attempt.stop_reason and waited > REPEAT_SIGNAL_SECONDS:
                self._signal_ranks()

    def _explain(self, code: int, records: list[dict[str, Any]], ranks: int) -> int:
        """The exit code that explains a command's end; sets the attempt's error. The first rank
        that failed by itself decides.
        """
        failures = [record for record in records if record["code"] not in (0, EXIT_RESUME)]
        failures.sort(key=lambda record: LOST_RANK in record["error"])
        silent = sorted(
            {f"rank-{rank}" for rank in range(ranks)} - {record["rank"] for record in records}
        )
        # A rank that lost the connection to a silent one says nothing about the cause.
        if failures and not (silent and LOST_RANK in failures[0]["error"]):
            failure = failures[0]
            self.attempt.error = failure["error"] or _unexplained(failure, self.run)
            self.attempt.unfit_nodes = sorted(
                {
                    record["node"]
                    for record in failures
                    if record["code"] == EXIT_UNFIT_NODE and record["node"]
                }
            )
            self._print_tail(failure["rank"])
            return int(failure["code"])
        if code == 0:
            return 0
        if not self.attempt.stop_reason and job_state.preempted(self.id):
            self.attempt.stop_reason = PREEMPTED
        stopped = len(records) == ranks  # and no rank failed
        if self.attempt.stop_reason or stopped:
            return EXIT_RESUME

        # Some ranks ended without a record: killed, or without a place to write one.
        cause = "it was killed, often because memory ran out, or its node failed"
        nodes = dict.fromkeys(self._node_of(rank, ranks) for rank in silent)
        if lost := job_state.lost_nodes(list(nodes)):
            cause = "SLURM lost " + ", ".join(f"{node} ({lost[node]})" for node in lost)
        elif code == USER_ERROR:  # it exited by itself, without a record of its error
            cause = f"it could not write why, so the disk of {self.run} may be full"
        self.attempt.error = (
            f"{', '.join(silent[:4]) or 'a rank'} on {', '.join(nodes) or 'a node'} ended without "
            f"a record (exit code {code}): {cause}"
        )
        self._print_tail(silent[0] if silent else "rank-0")
        return code

    def _node_of(self, rank: str, ranks: int) -> str:
        """The node of a rank: each node has as many, in order. rank: as in "rank-0"."""
        nodes = self.attempt.nodes
        return nodes[int(rank.removeprefix("rank-")) * len(nodes) // ranks]

    def _print_tail(self, rank: str) -> None:
        """Print the end of a failing rank's log to the job's log."""
        path = Path(self.logs.replace("rank-%t", rank))
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print("\n".join([f"the end of {path}:", *(f"  {line}" for line in lines)]), flush=True)

    def _conclude(self) -> int:
        """Decide, record, and requeue or move the job. Returns the job's exit code."""
        # Decide by this attempt and the ones before it.
        attempt = self.attempt
        attempt.end, attempt.progress = time.time(), progress(self.run, self.spec["name"])
        decision = decide(
            self.previous,
            attempt,
            max_attempts=self.spec["max_attempts"],
            ended_by_slurm=attempt.code != 0 and job_state.ended_by_slurm(self.id),
        )
        attempt.outcome, attempt.reason = decision.outcome, decision.reason
        self._record()
        print_line(f"{self.label}: {decision.outcome}: {decision.reason}")

        # Retry on the same nodes, or on others if a node is unfit.
        if decision.outcome == DONE:
            return 0
        if decision.outcome != RETRY:
            return attempt.code or 1
        try:
            if attempt.code == EXIT_UNFIT_NODE:
                return self._move(excluded_nodes([*self.previous, attempt]))
            return self._requeue()
        except PoclError as error:
            attempt.outcome = FAILED
            attempt.reason = f"{decision.reason}; but {error}; try again with `pocl resume`"
            self._record()
            print_line(f"{self.label}: {attempt.reason}")
            return attempt.code or 1

    def _requeue(self) -> int:
        """Requeue this job. SLURM ends this script meanwhile."""
        try:
            scheduler.retry_while_unreachable(
                lambda: scheduler.call("scontrol", "requeue", self.id)
            )
        except ResourceError as error:
            # SLURM has requeued it already, since it lost a node.
            if "pending execution" not in str(error):
                raise
            print_line(f"{self.label}: SLURM has requeued the job already")
        time.sleep(60)
        return EXIT_RESUME

    def _move(self, nodes: list[str]) -> int:
        """Submit a new job in place of this one that excludes `nodes`; jobs that wait for this one
        then wait for both.
        """
        options = [f"--exclude={','.join(filter(None, [self.spec['exclude'], *nodes]))}"]
        if self.task is not None:
            options.append(f"--array={self.task}")
        script = str(self.folder / "jobs" / f"{self.spec['name']}.sbatch")
        new_id = scheduler.retry_while_unreachable(lambda: scheduler.submit(script, options))
        with (self.folder / "jobs" / f"{self.spec['name']}.ids").open("a") as stream:
            stream.write(f"{new_id}\n")
        for name in self.spec["successors"]:
            for job_id in (self.folder / "jobs" / f"{name}.ids").read_text().split():
                for waiting in scheduler.live_jobs([job_id]):
                    scheduler.add_dependency(waiting.array, new_id)
        print_line(f"{self.label}: job {new_id} continues without {', '.join(nodes)}")
        return 0


def _unexplained(failure: Mapping[str, Any], run: Path) -> str:
    """A sentence about a rank that failed and recorded no error."""
    if failure["node"]:
        return f"{failure['rank']} on {failure['node']} exited with code {failure['code']}"
    return (
        f"{failure['rank']} exited with code {failure['code']} and could not write why, so the "
        f"disk of {run} may be full"
    )


def progress(run: Path, name: str) -> int:
    """Optimizer steps that a training has recorded; 0 for a job that does not train."""
    path = run / METRICS.get(name, "") / "metrics.jsonl"
    if name not in METRICS or not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - 65536, 0))
        steps = re.findall(rb'"kind": "step", "step": (\d+)', stream.read())
    return int(steps[-1]) if steps else 0


def main() -> int:
    """Run the job that the command line names. Returns its exit code."""
    early: list[int] = []  # signals that come before the job is read
    for number in SIGNALS:
        signal.signal(number, lambda received, _: early.append(received))
    run, name = Path(sys.argv[1]), sys.argv[2]
    job = Job(run, name)
    for number in SIGNALS:
        signal.signal(number, job.stop)
    for received in early:
        job.stop(received, None)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(run / ".lock", fcntl.LOCK_SH | fcntl.LOCK_NB))
        except LockTakenError as error:
            print_line(f"{run} is in use by {error}, outside SLURM: end it, then `pocl resume`")
            return 2
        except PoclError as error:
            print_line(str(error))
            return 2
        return job.execute()


if __name__ == "__main__":
    sys.exit(main())
