"""Kills real runs at random moments and compares their results with those of an undisturbed run.

    python tests/faults/harness.py --mode all --kills 15 --seed 0

Each kill sends SIGKILL to one rank, one step's process, or everything at once. The seed draws first
a workflow step (training for half of the kills), then a moment within it; then the same command
runs again. A finished run is compared bit by bit: every metrics record, the scores, the answers,
the weights. The program prints a line for each kill and a table of all modes, and exits with code 1
if a run fails to continue or differs. The modes are in tests/fault_modes.py.
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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from command_line import ROOT, environment
from fault_modes import MODES, write_mode_recipe

from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.workflow.steps import STEP_NAMES, enabled_steps

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
# Files that must be equal, by workflow step; each step of a mode has at least one of its own.
COMPARED_FILES = {
    "init-student": ("models/models.json", "models/heal/final/model.safetensors"),
    "generate-teacher": ("teacher_responses/train.jsonl",),
    "score": ("scores/*.jsonl",),
    "rank": ("ranking/order.npy",),
    "cache-teacher": ("teacher_cache/*/*.crc.npy",),
    "train": ("train/final/model.safetensors", "train/stages/*/*.npy"),
    "baseline": ("baseline/final/model.safetensors",),
    "evaluate": ("evaluation/*/*.jsonl",),
    "export": ("export/model.safetensors",),
}
KILLS_PER_RUN = 15
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
            f"{number:>4}  {self.victim:<10}{self.seconds:>7.1f} s  {self.workflow_step:<17}"
            f"{self.optimizer_step:>5}  {resumed:>8}{lost:>6}"
        )


class RunFailedError(Exception):
    """An attempt failed without a kill."""


@dataclass
class Subject:
    """The runs of one mode: what they have in common with the undisturbed one."""

    recipe: Path
    steps: list[str]
    reference: Path
    log: Path  # of the current attempt
    step_seconds: dict[str, float]  # of the undisturbed run


def prepare(folder: Path, mode: str) -> Subject:
    """Write the recipe of a mode and run it undisturbed."""
    folder.mkdir(parents=True)
    recipe, log = write_mode_recipe(folder, mode), folder / "log"
    steps = [step.name for step in enabled_steps(load_recipe(str(recipe)))]
    begin = time.monotonic()
    if code := start(recipe, folder / "reference", log).wait(timeout=ATTEMPT_TIMEOUT_SECONDS):
        raise RunFailedError(
            f"the undisturbed run failed with code {code}:\n{log.read_text()[-3000:]}"
        )
    subject = Subject(recipe, steps, folder / "reference", log, durations(log.read_text()))
    count, seconds = len(records(subject.reference)), time.monotonic() - begin
    print(f"{mode}: undisturbed: {count} optimizer steps, {seconds:.0f} s", flush=True)
    return subject


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


def targets(source: random.Random, steps: list[str], count: int, only: str | None) -> list[str]:
    """Workflow steps in which to kill a run, in order: half of the kills hit the training, and the
    others go round the other steps. only: a step that all kills hit.
    """
    if only is not None:
        return [only] * count
    other_steps = [name for name in steps if name != "train"]
    source.shuffle(other_steps)
    others = count - count // 2
    rounds = other_steps * (others // len(other_steps) + 1)
    return sorted(["train"] * (count // 2) + rounds[:others], key=steps.index)


def attempt(subject: Subject, run: Path, source: random.Random, target: str | None) -> Kill | None:
    """Start or continue a run, and kill it at a random moment of the target step. None if the run
    ends first, or without a target.

    Half of the kills in a training come while it trains, the others while it starts. Raises
    RunFailedError if the run ends with an error of its own.
    """
    log, steps = subject.log, subject.steps
    child = start(subject.recipe, run, log)
    begin = time.monotonic()
    while_training = target == "train" and source.random() < 0.5
    earlier_steps = steps[: steps.index(target)] if target else []
    recorded = len(records(run))
    moment = None
    while moment is None or time.monotonic() < moment:
        if child.poll() is not None:
            if child.returncode:
                raise RunFailedError(f"failed without a kill:\n{log.read_text()[-3000:]}")
            return None
        if target and moment is None and set(earlier_steps) <= set(finished_steps(log.read_text())):
            if not while_training:
                seconds = max(subject.step_seconds[target], 0.5)
                moment = time.monotonic() + source.uniform(0.0, seconds)
            elif len(records(run)) != recorded:  # this attempt has recorded a step
                moment = time.monotonic() + source.uniform(0.0, 2.0)
        time.sleep(0.02)
    seconds, victim = time.monotonic() - begin, kill(child, source)
    child.wait(timeout=ATTEMPT_TIMEOUT_SECONDS)
    time.sleep(0.5)  # orphaned processes end and release the lock
    finished = finished_steps(log.read_text())
    position = steps.index(finished[-1]) + 1 if finished else 0
    return Kill(victim, seconds, [*steps, "end"][position], len(records(run)))


def resumed_step(log: str, recorded: int) -> int | None:
    """The optimizer step at which an attempt's training continued, None if it was killed before."""
    if match := re.search(r"train: resuming after step (\d+) of", log):
        return int(match.group(1))
    if "train: already finished" in log:  # the kill came after the training's manifest
        return recorded
    return 0 if re.search(r"train  \d+/\d+ steps|train: finished", log) else None


def differences(subject: Subject, run: Path) -> list[str]:
    """Names of the results that differ from the undisturbed run."""
    reference = subject.reference
    differing = [] if records(run) == records(reference) else ["train/metrics.jsonl"]
    for step in COMPARED_FILES.keys() & set(subject.steps):
        paths = [path for pattern in COMPARED_FILES[step] for path in reference.glob(pattern)]
        assert paths, step
        for path in sorted(path.relative_to(reference) for path in paths):
            if (
                not (run / path).is_file()
                or (run / path).read_bytes() != (reference / path).read_bytes()
            ):
                differing.append(str(path))
    return differing


def kill_repeatedly(
    subject: Subject, run: Path, source: random.Random, remaining: list[str]
) -> tuple[list[Kill], str]:
    """Kill one run in the remaining steps and let it finish. Returns the kills, and what is wrong
    with the result: nothing if it equals the undisturbed run.
    """
    kills: list[Kill] = []
    problem = ""
    try:
        while result := attempt(subject, run, source, remaining.pop(0) if remaining else None):
            report_resume(kills, subject.log)
            kills.append(result)
    except RunFailedError as error:
        problem = str(error)
    report_resume(kills, subject.log)
    if not problem and (differing := differences(subject, run)):
        problem = f"DIFFERS in {', '.join(differing)}"
    return kills, problem


def report_resume(kills: list[Kill], log: Path) -> None:
    """Print the last kill, once the log of the next attempt tells where it resumed."""
    if kills:
        if kills[-1].workflow_step == "train":
            kills[-1].resumed = resumed_step(log.read_text(), kills[-1].optimizer_step)
        print(kills[-1].row(len(kills)), flush=True)


def run_mode(
    mode: str,
    kill_count: int,
    source: random.Random,
    folder: Path,
    only: str | None,
    outcomes: Counter[Any],
) -> int:
    """Kill runs of one mode, and count (mode, step, whether its run ended equal) in `outcomes`.
    Returns how many runs did not end equal.
    """
    subject = prepare(folder / mode, mode)
    print("kill  victim       after     workflow step     step  resumed at  lost", flush=True)
    # A killed step continues where it was, so that after two kills little of it is left.
    kills_per_run = KILLS_PER_RUN if only is None else 2
    done = bad_runs = 0
    for number in range(2 * kill_count):  # a run may end before all its kills
        if done >= kill_count:
            break
        run = subject.reference.with_name(f"run-{number}")
        remaining = targets(source, subject.steps, min(kills_per_run, kill_count - done), only)
        kills, problem = kill_repeatedly(subject, run, source, remaining)
        outcomes.update((mode, kill.workflow_step, not problem) for kill in kills)
        done += len(kills)
        bad_runs += bool(problem)
        print(f"      run {number}: {problem or 'bitwise equal'}", flush=True)
        if not problem:
            shutil.rmtree(run)
    return bad_runs


def print_table(outcomes: Counter[Any]) -> None:
    """Print, for each mode and workflow step, how many kills ended equal out of those tried."""
    modes = list(dict.fromkeys(mode for mode, _, _ in outcomes))
    print("\n| killed in | " + " | ".join(f"`{mode}`" for mode in modes) + " |")
    print("|---" * (len(modes) + 1) + "|")
    for step in [*STEP_NAMES, "end"]:
        cells = []
        for mode in modes:
            equal = outcomes[mode, step, True]
            tried = equal + outcomes[mode, step, False]
            cells.append(f"{equal} of {tried}" if tried else "")
        if any(cells):
            print(f"| {step} | " + " | ".join(cells) + " |")


def main(modes: list[str], kills: int, seed: int, folder: Path, only: str | None) -> int:
    """Kill runs in each mode and print the table. Returns 1 if a run does not end equal."""
    begin = time.monotonic()
    outcomes: Counter[Any] = Counter()
    bad_runs = 0
    for mode in modes:
        source = random.Random(f"{seed} {mode}")
        bad_runs += run_mode(mode, kills, source, folder, only, outcomes)
    print_table(outcomes)
    lost = sum(count for (_, _, equal), count in outcomes.items() if not equal)
    print(
        f"\n{outcomes.total()} kills, {lost} of them in {bad_runs} runs that failed or have "
        f"another result; {time.monotonic() - begin:.0f} s"
    )
    return 1 if bad_runs else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=[*MODES, "all"], nargs="+", default=["async_save"])
    parser.add_argument("--kills", type=int, default=15, help="number of kills in each mode")
    parser.add_argument("--step", choices=STEP_NAMES, help="kill in this workflow step alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep runs that do not end equal here")
    options = parser.parse_args()
    selected = list(MODES) if "all" in options.mode else options.mode
    with tempfile.TemporaryDirectory(prefix="pocl-faults-") as name:
        folder = options.folder or Path(name)
        sys.exit(main(selected, options.kills, options.seed, folder, options.step))
