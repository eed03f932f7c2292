"""Kills real runs at random moments and compares what comes of them with a run that nobody
disturbed.

    python tests/faults/harness.py --kills 50 --seed 0

Each kill is SIGKILL to one rank, one stage's process, or everything at once, at a moment drawn from
the seed: a stage first, half of them training, then a moment within it; then the same command goes
on. A run that reached its end is compared bit by bit: every step's record, the scores, the answers,
the weights. Ends with a table, and with code 1 where anything differs.
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

KEPT = (
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
STAGES = [
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
RUN = 13  # kills of one run
LONGEST = 400  # seconds that one attempt may take


@dataclass
class Kill:
    """One kill and what became of it."""

    victim: str
    seconds: float  # after the start of the attempt
    stage: str
    step: int  # recorded when it came
    resumed: int | None = None  # the step that the next attempt of the training went on from

    def row(self, number: int) -> str:
        """A line of the table."""
        lost = "" if self.resumed is None else str(self.step - self.resumed)
        resumed = "" if self.resumed is None else str(self.resumed)
        return f"{number:>4}  {self.victim:<10}{self.seconds:>7.1f} s  {self.stage:<10}{self.step:>5}  {resumed:>8}{lost:>6}"


def prepare(folder: Path) -> Path:
    """The recipe of a small run with dropout, three stages, and a checkpoint every third step,
    written while training goes on.
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
    """`pocl run`, its words going to a file."""
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
    """Children of a process, theirs, and so on."""
    found = []
    for child in subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True
    ).stdout.split():
        found += [int(child), *descendants(int(child))]
    return found


def kill(child: subprocess.Popen[bytes], source: random.Random) -> str:
    """SIGKILL to something of a run. Returns what."""
    family = descendants(child.pid)
    words = {pid: command_line(pid) for pid in family}
    workers = [
        pid for pid in family if "pocl_ds.cli.main" in words[pid] and "train.sh" not in words[pid]
    ]
    victim = source.choice(["worker", "worker", "everything"])
    if victim == "everything" or not workers:
        for pid in [child.pid, *family]:
            end(pid)
        return "everything"
    place = source.randrange(len(workers))
    end(workers[place])
    return f"rank {place}" if len(workers) > 1 else "process"


def command_line(pid: int) -> str:
    """The words that a process was started with."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def end(pid: int) -> None:
    """SIGKILL to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def records(run: Path) -> list[dict[str, Any]]:
    """The training's steps, without what depends on the clock."""
    path = run / "train" / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["kind"] == "step":
                found.append({key: record[key] for key in KEPT})
    return found


def durations(said: str) -> dict[str, float]:
    """Seconds of each stage of a whole run."""
    return {
        name: float(seconds)
        for name, seconds in re.findall(r"^\S+ (\w+): done in (\d+) s", said, re.MULTILINE)
    }


def done_stages(said: str) -> list[str]:
    """The stages that an attempt finished, or found finished."""
    return re.findall(r"^\S+ (\w+): done", said, re.MULTILINE)


def targets(source: random.Random, count: int) -> list[str]:
    """Stages to kill a run in, in their order; half of the kills fall into the training, wherever
    it is by then.
    """
    others = [name for name in STAGES if name != "train"]
    drawn = ["train" if source.random() < 0.5 else source.choice(others) for _ in range(count)]
    return sorted(drawn, key=STAGES.index)


def attempt(
    recipe: Path,
    run: Path,
    source: random.Random,
    target: str | None,
    lasts: dict[str, float],
    log: Path,
) -> Kill | None:
    """Start or go on, and kill at a random moment of the target's. None where the run came to its
    end before, or nobody kills.

    Half of a training's kills come while it steps, the others while it starts.
    """
    child = start(recipe, run, log)
    begin = time.monotonic()
    stepping = target == "train" and source.random() < 0.5
    before, recorded = STAGES[: STAGES.index(target)] if target else [], len(records(run))
    moment = None
    while moment is None or time.monotonic() < moment:
        if child.poll() is not None:
            if child.returncode:
                raise RuntimeError(f"the run failed by itself:\n{log.read_text()[-3000:]}")
            return None
        if target and moment is None and set(before) <= set(done_stages(log.read_text())):
            if not stepping:
                moment = time.monotonic() + source.uniform(0.0, max(lasts[target], 1.0))
            elif len(records(run)) != recorded:  # the first step of this attempt is there
                moment = time.monotonic() + source.uniform(0.0, 2.0)
        time.sleep(0.02)
    seconds, victim = time.monotonic() - begin, kill(child, source)
    child.wait(timeout=LONGEST)
    time.sleep(0.5)  # what was orphaned ends, and gives the lock back
    done = done_stages(log.read_text())
    stage = [*STAGES, "end"][STAGES.index(done[-1]) + 1] if done else STAGES[0]
    return Kill(victim, seconds, stage, len(records(run)))


def went_on_at(said: str, recorded: int) -> int | None:
    """The step that an attempt's training went on from; None where it was killed before it came to
    that.
    """
    if found := re.search(r"train: resuming after step (\d+) of", said):
        return int(found.group(1))
    if "train: done already" in said:  # the kill came after the training's manifest
        return recorded
    return 0 if re.search(r"train  \d+/\d+ steps|train: done", said) else None


def differences(run: Path, reference: Path) -> list[str]:
    """Names of the results that are not the same."""
    found = [] if records(run) == records(reference) else ["train/metrics.jsonl"]
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
                found.append(str(path))
    return found


def main(kills: int, seed: int, folder: Path) -> int:
    """The table. Returns 1 where a run differs from the undisturbed one."""
    source, log = random.Random(seed), folder / "log"
    recipe, reference = prepare(folder), folder / "reference"
    begin = time.monotonic()
    if code := start(recipe, reference, log).wait(timeout=LONGEST):
        raise RuntimeError(
            f"the undisturbed run ended with code {code}:\n{log.read_text()[-3000:]}"
        )
    lasts = durations(log.read_text())
    print(
        f"undisturbed: {len(records(reference))} steps, {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    print("kill  victim       after     stage      step  resumed at  lost", flush=True)
    table: list[Kill] = []
    runs = different = 0
    while len(table) < kills:
        run = folder / f"run-{runs}"
        pending: Kill | None = None
        ahead = targets(source, min(RUN, kills - len(table)))
        while True:
            found = attempt(recipe, run, source, ahead.pop(0) if ahead else None, lasts, log)
            if pending and pending.stage == "train":
                pending.resumed = went_on_at(log.read_text(), pending.step)
            if pending:
                print(pending.row(len(table)), flush=True)
            pending = found
            if found is None:
                break
            table.append(found)
        runs += 1
        wrong = differences(run, reference)
        different += bool(wrong)
        verdict = (
            f"DIFFERS in {', '.join(wrong)}"
            if wrong
            else "equal to the undisturbed one, bit by bit"
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
