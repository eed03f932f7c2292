"""What a job's script runs on its first node: the steps of the job, each by one srun, and what
comes after.

    python launch/pocl.py pocl_ds.cluster.job RUN NAME

Hands on SLURM's signals, notes each attempt, and decides by `attempts.judge` whether the job
requeues itself, moves to other nodes, or gives up. Only the standard library, so that its signal
handlers stand a moment after the job began.
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
from pathlib import Path
from typing import Any

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.attempts import (
    AGAIN,
    DONE,
    FAILED,
    MENDABLE,
    PREEMPTED,
    Attempt,
    excluded,
    judge,
    read_attempts,
    write_attempt,
)
from pocl_ds.errors import HANG, RESUME, UNFIT, PoclError, ResourceError
from pocl_ds.runtime.process_exit import FOLDER, SIGNALS, words_of_ranks
from pocl_ds.workflow.files import lock_file

AGAIN_SECONDS = 10.0  # a signal that came before a rank could hear it is given again
METRICS = {"init-student": "models/heal", "train": "train", "baseline": "baseline"}
TAIL = 12  # lines of a failing rank's log


def say(text: str) -> None:
    """A line of the job's own log, where there is room for it."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Job:
    """One attempt of a job, or of one task of an array."""

    def __init__(self, run: Path, name: str) -> None:
        self.run, self.folder = run, run / "cluster"
        self.spec: dict[str, Any] = json.loads((self.folder / "jobs" / f"{name}.json").read_text())
        self.task = os.environ.get("SLURM_ARRAY_TASK_ID")
        # A task has a number of its own too, but the last one's is that of the whole array.
        array = f"{os.environ.get('SLURM_ARRAY_JOB_ID')}_{self.task}"
        self.id = os.environ["SLURM_JOB_ID"] if self.task is None else array
        self.label = name if self.task is None else f"{name}-{self.task}"
        self.file = self.folder / "attempts" / f"{self.label}.jsonl"
        self.before = read_attempts(self.file)
        nodes = scheduler.call(
            "scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]
        ).split()
        self.attempt = Attempt(
            len(self.before) + 1, self.id, nodes, time.time(), progress=progress(run, name)
        )
        self.exits = self.folder / "exits" / f"{self.label}-a{self.attempt.number}"
        self.child: subprocess.Popen[bytes] | None = None
        self.asked = 0.0  # when the step was last given the signal

    def stop(self, number: int, _frame: Any) -> None:
        """The batch shell got a signal: the ranks finish their step, save, and leave."""
        self.attempt.stopped = self.attempt.stopped or signal.Signals(number).name
        self._ask()

    def _ask(self) -> None:
        if self.child and self.child.poll() is None:
            self.asked = time.monotonic()
            self.child.send_signal(signal.SIGUSR2)  # TERM would make srun kill the step

    def go(self) -> int:
        """Every step in order, then the verdict. Returns the exit code of the job."""
        say(
            f"{self.label}: attempt {self.attempt.number} as job {self.id} on "
            f"{', '.join(self.attempt.nodes)}"
        )
        self._note()
        if bad := sorted(set(excluded(self.before)) & set(self.attempt.nodes)):
            self.attempt.code, self.attempt.error = (
                UNFIT,
                f"{', '.join(bad)} failed this job before",
            )
        else:
            self.attempt.code = self._steps()
        return self._end()

    def _note(self) -> None:
        """Write down what is known of this attempt; a full disk does not end it."""
        try:
            write_attempt(self.file, self.attempt)
        except OSError as fault:
            say(
                f"{self.label}: {self.file} cannot be written ({fault.strerror}): `pocl status` "
                f"will not know of this"
            )

    def _steps(self) -> int:
        steps = (
            [(["--module", "pocl_ds.cluster.preflight"], [self.spec["name"]], True)]
            if self.spec["preflight"]
            else []
        )
        for number, step in enumerate(self.spec["commands"]):
            item = (
                self.spec["array"][int(self.task or 0)]
                if self.spec["array"] and number + 1 == len(self.spec["commands"])
                else []
            )
            steps.append(([], [*step["arguments"], *item], step["ranks"]))
        for number, (options, words, ranks) in enumerate(steps):
            if self.attempt.stopped:
                return RESUME
            if code := self._step(
                number, options, words, self.spec["tasks_per_node"] if ranks else 0
            ):
                return code
        return 0

    def _step(self, number: int, options: list[str], words: list[str], tasks_per_node: int) -> int:
        """One srun over all tasks, or over one."""
        nodes, per_node = (self.spec["nodes"], tasks_per_node) if tasks_per_node else (1, 1)
        exits = self.exits / str(number)
        # The name of an attempt stays in the logs: a second one never writes over what the first
        # one said.
        what = words[0] if not options else "preflight"
        self.logs = f"{self.run}/logs/{self.label}-a{self.attempt.number}-{what}-rank-%t.log"
        command = srun(self.spec, self.run, nodes, per_node, self.logs)
        command += [
            "bash",
            f"{self.folder}/code/launch/train.sh",
            *options,
            *words,
            "--run-dir",
            str(self.run),
        ]
        say(f"{self.label}: {what} on {nodes * per_node} rank{'s' if nodes * per_node > 1 else ''}")
        environment = {**os.environ, FOLDER: str(exits), "POCL_WITHIN": "1"}
        environment["POCL_PYTHON"] = (self.spec["container"] or {}).get("python") or self.spec[
            "python"
        ]
        # Known here, where `scontrol` is; an image may lack it. What the submitting shell said of
        # it was of another run.
        environment.pop("MASTER_PORT", None)
        environment["MASTER_ADDR"] = self.attempt.nodes[0] if nodes > 1 else "127.0.0.1"
        if self.spec["gpus_per_node"]:  # then no node may take itself for one without
            environment["POCL_GPUS"] = str(self.spec["gpus_per_node"])
        self.child = subprocess.Popen(command, env=environment)
        if self.attempt.stopped:  # it came between the question and the start
            self._ask()
        noted = ""
        while True:
            try:
                code = self.child.wait(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                if (
                    self.attempt.stopped != noted
                ):  # known also where the time that it is given does not last
                    self.attempt.stopped = noted = (
                        PREEMPTED if preempted(self.id) else self.attempt.stopped
                    )
                    self._note()
                if self.attempt.stopped and time.monotonic() - self.asked > AGAIN_SECONDS:
                    self._ask()
        code = code if code >= 0 else 128 - code
        left = words_of_ranks(exits)
        if what == "preflight" and code and not self.attempt.stopped:
            dumb = sorted(set(self.attempt.nodes) - {word["node"] for word in left})
            # Where a rank leaves with a fault, srun ends the others: who has no word then was only
            # cut short.
            waited = all(word["code"] in (0, HANG) for word in left)
            if left and dumb and waited:  # it could not even start its ranks
                self.attempt.error, self.attempt.suspects = (
                    f"preflight: {', '.join(dumb)}: no rank of it came to answer",
                    dumb,
                )
                return UNFIT
        return self._meaning(code, left, nodes * per_node)

    def _meaning(self, code: int, words: list[dict[str, Any]], tasks: int) -> int:
        """The exit code that says what happened, and its error: the first rank that failed by
        itself decides.
        """
        faults = [word for word in words if word["code"] not in (0, RESUME)]
        if faults:
            first = faults[0]
            self.attempt.error = (
                first["error"]
                or f"{first['rank']} on {first['node']} left with code {first['code']}"
            )
            self.attempt.suspects = sorted(
                {word["node"] for word in faults if word["code"] == UNFIT}
            )
            self._show(first["rank"])
            return int(first["code"])
        if code == 0:
            return 0
        if not self.attempt.stopped and preempted(self.id):
            self.attempt.stopped = PREEMPTED
        if self.attempt.stopped or (
            len(words) == tasks and all(word["code"] in (0, RESUME) for word in words)
        ):
            return RESUME
        quiet = sorted({f"rank-{rank}" for rank in range(tasks)} - {word["rank"] for word in words})
        often = "killed, often for want of memory, or its node is gone"
        if code == MENDABLE:  # it left by itself, and would have said why
            often = f"it found no room to say why, so the disk of {self.run} may be full"
        self.attempt.error = (
            f"{', '.join(quiet[:4]) or 'a rank'} ended without a word (exit code {code}): {often}"
        )
        self._show(quiet[0] if quiet else "rank-0")
        return code

    def _show(self, rank: str) -> None:
        """The end of a failing rank's log, where a person will look."""
        path = Path(self.logs.replace("rank-%t", rank))
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()[-TAIL:]
            print("\n".join([f"the end of {path}:", *(f"  {line}" for line in lines)]), flush=True)

    def _end(self) -> int:
        attempt = self.attempt
        attempt.end, attempt.progress = time.time(), progress(self.run, self.spec["name"])
        verdict = judge(
            self.before,
            attempt,
            most=self.spec["attempts"],
            taken=attempt.code != 0 and taken_away(self.id),
        )
        attempt.outcome, attempt.why = verdict.outcome, verdict.why
        self._note()
        say(f"{self.label}: {verdict.outcome}: {verdict.why}")
        if verdict.outcome == DONE:
            return 0
        if verdict.outcome != AGAIN:
            return attempt.code or 1
        try:
            return (
                self._move(excluded([*self.before, attempt]))
                if attempt.code == UNFIT
                else self._requeue()
            )
        except PoclError as error:
            attempt.outcome, attempt.why = (
                FAILED,
                f"{verdict.why}; but {error}; `pocl resume` tries again",
            )
            self._note()
            say(f"{self.label}: {attempt.why}")
            return attempt.code or 1

    def _requeue(self) -> int:
        """The same job once more. SLURM ends this script while it does so."""
        scheduler.patiently(lambda: scheduler.call("scontrol", "requeue", self.id))
        time.sleep(60)
        return RESUME

    def _move(self, nodes: list[str]) -> int:
        """A new job in place of this one, on other nodes; what waits for this one waits for both."""
        options = [f"--exclude={','.join(filter(None, [self.spec['exclude'], *nodes]))}"]
        if self.task is not None:
            options.append(f"--array={self.task}")
        script = str(self.folder / "jobs" / f"{self.spec['name']}.sbatch")
        new = scheduler.patiently(lambda: scheduler.submit(script, options))
        with (self.folder / "jobs" / f"{self.spec['name']}.ids").open("a") as stream:
            stream.write(f"{new}\n")
        for name in self.spec["before"]:
            for line in (self.folder / "jobs" / f"{name}.ids").read_text().split():
                for waiting in scheduler.live([line]):
                    old = re.search(
                        r"Dependency=(\S+)",
                        scheduler.call("scontrol", "show", "job", waiting.array),
                    )
                    also = (
                        re.sub(r"\([^)]*\)", "", old.group(1))
                        if old and old.group(1) != "(null)"
                        else ""
                    )
                    scheduler.call(
                        "scontrol",
                        "update",
                        f"JobId={waiting.array}",
                        f"Dependency={','.join(filter(None, [also, f'afterok:{new}']))}",
                    )
        say(f"{self.label}: job {new} goes on without {', '.join(nodes)}")
        return 0


def srun(spec: dict[str, Any], run: Path, nodes: int, tasks_per_node: int, logs: str) -> list[str]:
    """The words of a step: its tasks, their cores, a log a rank, and the container it runs in."""
    command = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={spec['cpus_per_task']}",
        "--kill-on-bad-exit=1",
        "--wait=30",
        "--export=ALL",
        f"--output={logs}",
    ]
    if re.search(r"TaskPlugin\s*=\s*\S*(affinity|cgroup)", _shown("config")):
        command.append("--cpu-bind=cores")
    container = spec["container"]
    if not container:
        return command
    here = os.getcwd()  # where the recipe's relative paths begin
    mounts = [f"{path}:{path}" for path in dict.fromkeys([str(run), here])] + list(
        container["mounts"]
    )
    if container["runtime"] == "pyxis":
        return [
            *command,
            f"--container-image={container['image']}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={here}",
        ]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    nvidia = ["--nv"] if spec["gpus_per_node"] else []
    return [*command, "apptainer", "exec", *nvidia, *binds, "--pwd", here, container["image"]]


def progress(run: Path, name: str) -> int:
    """Steps that a training recorded; 0 for a job without steps."""
    path = run / METRICS.get(name, "") / "metrics.jsonl"
    if name not in METRICS or not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - 65536, 0))
        steps = re.findall(rb'"kind": "step", "step": (\d+)', stream.read())
    return int(steps[-1]) if steps else 0


def taken_away(job: str) -> bool:
    """Whether SLURM is ending the job for another reason than its time limit: cancelled, it must
    not come back; requeued by somebody, or since a node failed, it does so by itself. Which of the
    two, SLURM does not tell while it is at it.
    """
    shown = _shown("job", job)
    state = re.search(r"JobState=(\S+)", shown)
    if state is None or state.group(1) in ("RUNNING", "TIMEOUT"):
        return False
    used, limit = (re.search(rf"{name}=(\S+)", shown) for name in ("RunTime", "TimeLimit"))
    return not (
        used
        and limit
        and limit.group(1) != "UNLIMITED"
        and _seconds(used.group(1)) >= _seconds(limit.group(1))
    )


def _seconds(text: str) -> int:
    """Of D-HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def preempted(job: str) -> bool:
    """Whether the scheduler takes the job's nodes for another."""
    found = re.search(r"PreemptTime=(\S+)", _shown("job", job))
    return bool(found and found.group(1) not in ("None", "N/A"))


def _shown(*what: str) -> str:
    """What the controller says; nothing where it is away, as that must not end a job."""
    with contextlib.suppress(ResourceError):
        return scheduler.call("scontrol", "show", *what)
    return ""


def main() -> int:
    """Run the job that the command line names. Returns its exit code."""
    early: list[int] = []  # signals may come before the job is read
    for number in SIGNALS:
        signal.signal(number, lambda got, _: early.append(got))
    run, name = Path(sys.argv[1]), sys.argv[2]
    job = Job(run, name)
    for number in SIGNALS:
        signal.signal(number, job.stop)
    for got in early:
        job.stop(got, None)
    with (run / ".lock").open(
        "a+"
    ) as held:  # NFSv4 refuses a shared lock on what was opened for writing alone
        try:
            lock_file(held.fileno(), run / ".lock", fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{run} is in use by a pocl process outside SLURM: end it, then `pocl resume`")
            return 2
        except ResourceError as error:
            say(str(error))
            return 2
        return job.go()


if __name__ == "__main__":
    sys.exit(main())
