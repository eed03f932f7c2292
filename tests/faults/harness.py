"""Kills real runs at random moments and compares their results with those of an undisturbed run.

    python tests/faults/harness.py --kills 50 --seed 0

Each kill sends SIGKILL to one rank, one step's process, or everything at once. The seed draws first
a workflow step (training for half of the kills), then a moment within it; then the same command
runs again. A finished run is compared bit by bit: every metrics record, the scores, the answers,
the weights. The program prints a table and exits with code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import tiny_models
from command_line import ROOT, environment
from tiny_runs import write_recipe

# Fields of a metrics record that do not depend on the clock.
COMPARED_FIELDS = (
    "step",
    "stage",
    "epoch",
    "loss",
    "kd_loss",
    "sft_loss",
    "temperature",
    "sft_ratio",
    "lr",
    "grad_norm",
    "loss_tokens",
    "sample_ids_digest",
)
WORKFLOW_STEPS = [
    "preprocess",
    "init-student",
    "score",
    "rank",
    "plan",
    "train",
    "evaluate",
    "export",
    "report",
]
KILLS_PER_RUN = 13
ATTEMPT_TIMEOUT_SECONDS = 400


@dataclass
class Kill:
    """One kill, and where the next attempt resumed."""

    victim: str
    seconds: float  # after the start of the attempt
    workflow_step: str
    optimizer_step: int  # the last one recorded at the kill
    resumed: int | None = None  # the optimizer step at which the next attempt continued

    def row(self, number: int) -> str:
        """A line of the table."""
        lost = "" if self.resumed is None else str(self.optimizer_step - self.resumed)
        resumed = "" if self.resumed is None else str(self.resumed)
        return (
            f"{number:>4}  {self.victim:<10}{self.seconds:>7.1f} s  {self.workflow_step:<14}"
            f"{self.optimizer_step:>5}  {resumed:>8}{lost:>6}"
        )


def prepare(folder: Path) -> Path:
    """Write the recipe of a small run with dropout, three stages, and an asynchronous checkpoint
    every third optimizer step.
    """
    teacher = tiny_models.llama(folder / "teacher", tied=False, seed=1)
    student = tiny_models.llama(folder / "student")
    return write_recipe(
        folder,
        teacher,
        student,
        max_train_samples=60,
        student={"heal_steps": 4, "dropout": 0.1},
        score={"shards": 4},
        curriculum={"epochs_per_stage": 4},
        train={"checkpoint": {"every_n_steps": 3, "async_save": True}},
    )


def start(recipe: Path, run: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start `pocl run` with its output in a file."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pocl_ds.cli.main", "run", str(recipe), "--run-dir", str(run)],
            cwd=ROOT,
            env={**environment(), "POCL_KILL_GRACE": "2"},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    pids = []
    for child in subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True
    ).stdout.split():
        pids += [int(child), *descendants(int(child))]
    return pids


def kill(child: subprocess.Popen[bytes], source: random.Random) -> str:
    """Send SIGKILL to a random process of a run, or to all. Returns which."""
    family = descendants(child.pid)
    commands = {pid: command_line(pid) for pid in family}
    workers = [
        pid
        for pid in family
        if "launch/pocl.py" in commands[pid] and "train.sh" not in commands[pid]
    ]
    victim = source.choice(["worker", "worker", "everything"])
    if victim == "everything" or not workers:
        for pid in [child.pid, *family]:
            send_kill(pid)
        return "everything"
    index = source.randrange(len(workers))
    send_kill(workers[index])
    return f"rank {index}" if len(workers) > 1 else "process"


def command_line(pid: int) -> str:
    """The command line of a process, empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def send_kill(pid: int) -> None:
    """Send SIGKILL to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics of the training's optimizer steps, without fields that depend on the clock."""
    path = run / "train" / "metrics.jsonl"
    step_records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["kind"] == "step":
                step_records.append({key: record[key] for key in COMPARED_FIELDS})
    return step_records


def durations(log: str) -> dict[str, float]:
    """Seconds of each workflow step of an undisturbed run, from its log."""
    return {
        name: float(seconds)
        for name, seconds in re.findall(r"^\S+ ([\w-]+): finished in (\d+) s", log, re.MULTILINE)
    }


def finished_steps(log: str) -> list[str]:
    """The workflow steps that were finished before or during an attempt."""
    return re.findall(r"^\S+ ([\w-]+): (?:already )?finished", log, re.MULTILINE)


def targets(source: random.Random, count: int) -> list[str]:
    """Workflow steps in which to kill a run, in order; half of the kills hit the training."""
    other_steps = [name for name in WORKFLOW_STEPS if name != "train"]
    sampled = [
        "train" if source.random() < 0.5 else source.choice(other_steps) for _ in range(count)
    ]
    return sorted(sampled, key=WORKFLOW_STEPS.index)


def attempt(
    recipe: Path,
    run: Path,
    source: random.Random,
    target: str | None,
    step_seconds: dict[str, float],
    log: Path,
) -> Kill | None:
    """Start or continue a run, and kill it at a random moment of the target step. None if the run
    ends first, or without a target.

    Half of the kills in a training come while it trains, the others while it starts.
    """
    child = start(recipe, run, log)
    begin = time.monotonic()
    while_training = target == "train" and source.random() < 0.5
    earlier_steps = WORKFLOW_STEPS[: WORKFLOW_STEPS.index(target)] if target else []
    recorded = len(records(run))
    moment = None
    while moment is None or time.monotonic() < moment:
        if child.poll() is not None:
            if child.returncode:
                raise RuntimeError(f"the run failed without a kill:\n{log.read_text()[-3000:]}")
            return None
        if target and moment is None and set(earlier_steps) <= set(finished_steps(log.read_text())):
            if not while_training:
                moment = time.monotonic() + source.uniform(0.0, max(step_seconds[target], 1.0))
            elif len(records(run)) != recorded:  # this attempt has recorded a step
                moment = time.monotonic() + source.uniform(0.0, 2.0)
        time.sleep(0.02)
    seconds, victim = time.monotonic() - begin, kill(child, source)
    child.wait(timeout=ATTEMPT_TIMEOUT_SECONDS)
    time.sleep(0.5)  # orphaned processes end and release the lock
    finished = finished_steps(log.read_text())
    position = WORKFLOW_STEPS.index(finished[-1]) + 1 if finished else 0
    return Kill(victim, seconds, [*WORKFLOW_STEPS, "end"][position], len(records(run)))


def resumed_step(log: str, recorded: int) -> int | None:
    """The optimizer step at which an attempt's training continued, None if it was killed before."""
    if match := re.search(r"train: resuming after step (\d+) of", log):
        return int(match.group(1))
    if "train: already finished" in log:  # the kill came after the training's manifest
        return recorded
    return 0 if re.search(r"train  \d+/\d+ steps|train: finished", log) else None


def differences(run: Path, reference: Path) -> list[str]:
    """Names of the results that differ."""
    differing = [] if records(run) == records(reference) else ["train/metrics.jsonl"]
    patterns = (
        "train/final/model.safetensors",
        "models/heal/final/model.safetensors",
        "scores/*.jsonl",
        "ranking/order.npy",
        "evaluation/*/*.jsonl",
        "export/model.safetensors",
    )
    for pattern in patterns:
        paths = sorted(path.relative_to(reference) for path in reference.glob(pattern))
        assert paths, pattern
        for path in paths:
            if (
                not (run / path).is_file()
                or (run / path).read_bytes() != (reference / path).read_bytes()
            ):
                differing.append(str(path))
    return differing


def main(kills: int, seed: int, folder: Path) -> int:
    """Kill runs and print the table. Returns 1 if a run differs from the undisturbed one."""
    source, log = random.Random(seed), folder / "log"
    recipe, reference = prepare(folder), folder / "reference"
    begin = time.monotonic()
    if code := start(recipe, reference, log).wait(timeout=ATTEMPT_TIMEOUT_SECONDS):
        raise RuntimeError(
            f"the undisturbed run failed with code {code}:\n{log.read_text()[-3000:]}"
        )
    step_seconds = durations(log.read_text())
    print(
        f"undisturbed: {len(records(reference))} steps, {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    print("kill  victim       after     workflow step  step  resumed at  lost", flush=True)
    table: list[Kill] = []
    runs = different = 0
    while len(table) < kills:
        run = folder / f"run-{runs}"
        pending: Kill | None = None
        remaining = targets(source, min(KILLS_PER_RUN, kills - len(table)))
        while True:
            kill_result = attempt(
                recipe, run, source, remaining.pop(0) if remaining else None, step_seconds, log
            )
            if pending and pending.workflow_step == "train":
                pending.resumed = resumed_step(log.read_text(), pending.optimizer_step)
            if pending:
                print(pending.row(len(table)), flush=True)
            pending = kill_result
            if kill_result is None:
                break
            table.append(kill_result)
        runs += 1
        differing = differences(run, reference)
        different += bool(differing)
        verdict = (
            f"DIFFERS in {', '.join(differing)}"
            if differing
            else "bitwise equal to the undisturbed run"
        )
        print(f"      run {runs}: {verdict}", flush=True)
        shutil.rmtree(run)
    print(
        f"{len(table)} kills in {runs} runs, {different} of them with another result; "
        f"{time.monotonic() - begin:.0f} s"
    )
    return 1 if different else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pocl-faults-") as name:
        sys.exit(main(options.kills, options.seed, Path(name)))
