"""`pocl watch`: one run live in a terminal, from its directory alone, so that it works from any
machine that sees it.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pocl_ds.cluster.attempts import read_attempts
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.curriculum.plan_step import optimizer_steps_by_stage
from pocl_ds.errors import ArtifactError
from pocl_ds.runtime.tracking import clock, read_metrics
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.manifest import MANIFEST, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEPS

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 20  # steps that a rate is taken over
EVENTS = 5
QUIET = 120.0  # seconds without a word after which a stage is said to be silent


@dataclass
class View:
    """What is seen of a run at one moment."""

    title: str
    stages: list[tuple[str, str]]  # name, and `done`, `now` or nothing
    working: str = ""  # the newest line of the stage at work
    silent: float = 0.0  # seconds since then
    training: str | None = None  # train or baseline
    steps: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    bands: list[int] = field(
        default_factory=list
    )  # the step after which each stage of the plan ends
    events: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to wait for."""
        return all(mark == "done" for _, mark in self.stages)


def look(run: RunDirectory) -> View:
    """Read a run's directory. Raises ArtifactError where there is no run."""
    if not run.recipe.is_file():
        raise ArtifactError(f"{run.path} holds no recipe.yaml: give the directory of a run")
    recipe = load_recipe(str(run.recipe))
    done = finished_steps(run, recipe)
    names = [stage.name for stage in STEPS if stage.wanted(recipe)]
    now = next((name for name in names if not done[name]), None)
    teacher = f"{recipe.teacher.model} → " if recipe.teacher else ""
    view = View(
        f"{recipe.name}: {teacher}{recipe.student.model}, {recipe.loss.name}, {recipe.policy.name}",
        [(name, "done" if done[name] else "now" if name == now else "") for name in names],
    )
    if now and (path := _newest(run, now)):
        view.working, view.silent = _last_line(path), time.time() - path.stat().st_mtime
    for training, folder in (("train", run.train), ("baseline", run.baseline)):
        if (metrics := folder / "metrics.jsonl").is_file():
            view.training, view.steps = training, read_metrics(metrics)
            view.bands = list(itertools.accumulate(optimizer_steps_by_stage(run, training)))
            view.total = view.bands[-1] if view.bands else 0
    view.events = _events(run)[-EVENTS:]
    return view


def screen(view: View, width: int) -> str:
    """The view as lines of at most `width` characters."""
    marks = {"done": "✓", "now": "▸", "": "·"}
    lines = [view.title, "  ".join(f"{marks[mark]} {name}" for name, mark in view.stages)]
    if view.working:
        quiet = f"  (silent for {clock(view.silent)})" if view.silent > QUIET else ""
        lines += ["", view.working + quiet]
    if view.steps:
        lines += ["", *_training(view, width)]
    if view.events:
        lines += ["", *view.events]
    return "\n".join(line[:width] for line in lines)


def spark(values: Sequence[float], width: int) -> str:
    """The run of some values in at most `width` characters, each the mean of its share; what is not
    finite is left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * number // count for number in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(
        BLOCKS[min(len(BLOCKS) - 1, int((mean - low) / span * len(BLOCKS)))] for mean in means
    )


def _training(view: View, width: int) -> list[str]:
    last, recent = view.steps[-1], view.steps[-RECENT:]
    seconds = median(record["seconds"] for record in recent)
    stage = f"stage {last['stage'] + 1}/{max(len(view.bands), 1)}"
    left = (
        f", {clock((view.total - last['step']) * seconds)} left"
        if view.total > last["step"]
        else ""
    )
    words = [
        f"{view.training}: step {last['step']}/{view.total}, {stage}, {seconds:.2f} s a step, "
        f"{median(record['tokens_per_second'] for record in recent):.0f} tokens/s{left}"
    ]
    for name in ("loss", "kd", "ce"):
        values = [record[name] for record in view.steps]
        words.append(f"{name:<5}{values[-1]:>9.4f}  {spark(values, max(8, width - 18))}")
    words.append(
        f"temperature {last['temperature']:.2f}  SFT share {last['sft_ratio']:.2f}  lr {last['lr']:.2e}  gradient norm "
        f"{last['grad_norm']:.3f}"
    )
    memory = f"memory {last['memory_gib']:.1f} GiB (rank 0)" if "memory_gib" in last else ""
    busy = f", GPU {last['gpu_busy']:.0f}% busy" if "gpu_busy" in last else ""
    share = (
        f", writing {100 * last['rollout_share']:.0f}% of a step" if "rollout_share" in last else ""
    )
    return [*words, memory + busy + share] if memory else words


def _newest(run: RunDirectory, stage: str) -> Path | None:
    logs = [*run.logs.glob(f"{stage}.log"), *run.logs.glob(f"{stage}-*.log")]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def _last_line(path: Path) -> str:
    lines = [line for line in _tail(path).replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _tail(path: Path, size: int = 8192) -> str:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - size))
        return stream.read().decode(errors="replace")


def _events(run: RunDirectory) -> list[str]:
    """Warnings, validations, checkpoints and attempts, oldest first."""
    found: list[tuple[float, str]] = []
    for path in run.logs.glob("*.log"):
        for line in _tail(path).splitlines():
            parts = line.split(" ", 3)
            if len(parts) == 4 and (
                parts[2] in ("WARNING", "ERROR") or "validation loss" in parts[3]
            ):
                try:
                    moment = time.mktime(
                        time.strptime(f"{parts[0]} {parts[1]}", "%Y-%m-%d %H:%M:%S")
                    )
                except ValueError:
                    continue
                found.append((moment, f"{parts[1]}  {parts[3]}"))
    for folder in (run.train, run.baseline):
        for path in (folder / "checkpoints").glob("step-*"):
            if path.is_dir() and not path.suffix:
                moment = path.stat().st_mtime
                found.append((moment, f"{_time(moment)}  {folder.name}: checkpoint {path.name}"))
    for path in (run.cluster / "attempts").glob("*.jsonl"):
        for attempt in read_attempts(path)[1:]:
            moment = attempt.start
            found.append(
                (
                    moment,
                    f"{_time(moment)}  {path.stem}: attempt {attempt.number}, "
                    f"{attempt.outcome or 'running'}",
                )
            )
    for stage in STEPS:
        manifest, file = read_manifest(stage.directory(run)), stage.directory(run) / MANIFEST
        if manifest and file.is_file():
            found.append(
                (file.stat().st_mtime, f"{_time(file.stat().st_mtime)}  {stage.name}: done")
            )
    return [text for _, text in sorted(found)]


def _time(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))


def watch(run: RunDirectory, *, interval: float, once: bool) -> None:
    """Draw the run again and again until it is finished, or once."""
    while True:
        view = look(run)
        width = os.get_terminal_size().columns if os.isatty(1) else 120
        print(screen(view, width) if once else f"\x1b[2J\x1b[H{screen(view, width)}", flush=True)
        if once or view.finished:
            return
        time.sleep(interval)
