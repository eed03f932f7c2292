"""`pocl watch`: one run live in a terminal, from its directory alone, so that it works on every
machine that mounts it.
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
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.manifest import MANIFEST, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEPS, enabled_steps

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT_STEPS = 20  # optimizer steps that a rate is averaged over
MAX_EVENTS = 5
SILENT_SECONDS = 120.0  # without a log line, after which a step is shown as silent


@dataclass
class RunView:
    """The state of a run at one moment."""

    title: str
    steps: list[tuple[str, str]]  # name, and "done", "running" or ""
    log_line: str = ""  # newest line of the running step's log
    silent_seconds: float = 0.0  # since that line
    training: str | None = None  # train or baseline
    records: list[dict[str, Any]] = field(default_factory=list)  # its optimizer steps
    # The optimizer step after which each stage of the curriculum ends.
    stage_ends: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every step is finished."""
        return all(mark == "done" for _, mark in self.steps)

    @property
    def total(self) -> int:
        """Optimizer steps of the training, 0 if unknown."""
        return self.stage_ends[-1] if self.stage_ends else 0


def read_view(run: RunDirectory) -> RunView:
    """Read a run's directory. Raises ArtifactError if it holds no run."""
    if not run.recipe.is_file():
        raise ArtifactError(f"{run.path} holds no recipe.yaml: give the directory of a run")
    recipe = load_recipe(str(run.recipe))
    finished = finished_steps(run, recipe)
    names = [step.name for step in enabled_steps(recipe)]
    running = next((name for name in names if not finished[name]), None)
    teacher = f"{recipe.teacher.model} → " if recipe.teacher else ""
    view = RunView(
        f"{recipe.name}: {teacher}{recipe.student.model}, {recipe.loss.name}, {recipe.policy.name}",
        [
            (name, "done" if finished[name] else "running" if name == running else "")
            for name in names
        ],
    )
    if running and (log := _newest_log(run, running)):
        view.log_line = _last_line(log)
        view.silent_seconds = time.time() - log.stat().st_mtime
    for training, folder in (("train", run.train), ("baseline", run.baseline)):
        if (metrics := folder / "metrics.jsonl").is_file():
            view.training, view.records = training, read_metrics(metrics)
            view.stage_ends = list(itertools.accumulate(optimizer_steps_by_stage(run, training)))
    view.events = _events(run)[-MAX_EVENTS:]
    return view


def render(view: RunView, width: int) -> str:
    """The view as lines of at most `width` characters."""
    marks = {"done": "✓", "running": "▸", "": "·"}
    lines = [view.title, "  ".join(f"{marks[mark]} {name}" for name, mark in view.steps)]
    if view.log_line:
        silent = view.silent_seconds > SILENT_SECONDS
        suffix = f"  (silent for {format_duration(view.silent_seconds)})" if silent else ""
        lines += ["", view.log_line + suffix]
    if view.records:
        lines += ["", *_training_lines(view, width)]
    if view.events:
        lines += ["", *view.events]
    return "\n".join(line[:width] for line in lines)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values in at most `width` block characters, each the mean of its share; values that are
    not finite are left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * number // count for number in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    levels = (int((mean - low) / span * len(BLOCKS)) for mean in means)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, level)] for level in levels)


def _training_lines(view: RunView, width: int) -> list[str]:
    """Rate, loss curves, schedule and resources of a training."""
    # Progress and rate.
    record, recent = view.records[-1], view.records[-RECENT_STEPS:]
    seconds = median(record["seconds"] for record in recent)
    rate = median(record["tokens_per_second"] for record in recent)
    remaining = view.total - record["step"]
    eta = f", {format_duration(remaining * seconds)} left" if remaining > 0 else ""
    lines = [
        f"{view.training}: step {record['step']}/{view.total}, "
        f"stage {record['stage'] + 1}/{max(len(view.stage_ends), 1)}, {seconds:.2f} s a step, "
        f"{rate:.0f} tokens/s{eta}"
    ]

    # Loss curves, schedule and resources.
    for name in ("loss", "kd_loss", "sft_loss"):
        values = [record[name] for record in view.records]
        lines.append(f"{name:<9}{values[-1]:>9.4f}  {sparkline(values, max(8, width - 22))}")
    lines.append(
        f"temperature {record['temperature']:.2f}  SFT ratio {record['sft_ratio']:.2f}  "
        f"lr {record['lr']:.2e}  gradient norm {record['grad_norm']:.3f}"
    )
    if "student_seconds" in record:
        lines.append(_step_parts(record))
    if "memory_gib" in record:
        resources = [f"memory {record['memory_gib']:.1f} GiB (rank 0)"]
        if "gpu_busy" in record:
            resources.append(f"GPU {record['gpu_busy']:.0f}% busy")
        if "rollout_share" in record:
            resources.append(f"generation {100 * record['rollout_share']:.0f}% of a step")
        lines.append(", ".join(resources))
    return lines


def _step_parts(record: dict[str, Any]) -> str:
    """The parts of an optimizer step in percent, MFU if it is known, and the load imbalance of
    several ranks.
    """
    parts = ", ".join(
        f"{part} {100 * record[f'{part}_seconds'] / record['seconds']:.0f}%"
        for part in ("data", "teacher", "student", "optimizer", "wait")
    )
    utilization = f", MFU {100 * record['mfu']:.0f}%" if "mfu" in record else ""
    imbalance = (
        f", load imbalance {record['load_imbalance']:.2f}" if "load_imbalance" in record else ""
    )
    return f"of a step: {parts}{utilization}{imbalance}"


def _newest_log(run: RunDirectory, step: str) -> Path | None:
    logs = [*run.logs.glob(f"{step}.log"), *run.logs.glob(f"{step}-*.log")]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def _last_line(path: Path) -> str:
    lines = [line for line in _tail(path).replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _tail(path: Path, size: int = 8192) -> str:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - size))
        return stream.read().decode(errors="replace")


def _events(run: RunDirectory) -> list[str]:
    """Warnings, validations, checkpoints, attempts and finished steps, oldest first."""
    events = [event for path in run.logs.glob("*.log") for event in _log_events(path)]
    for folder in (run.train, run.baseline):
        for path in (folder / "checkpoints").glob("step-*"):
            if path.is_dir() and not path.suffix:  # a suffix marks one that is being written
                moment = path.stat().st_mtime
                events.append((moment, f"{folder.name}: checkpoint {path.name}"))
    for path in (run.cluster / "attempts").glob("*.jsonl"):
        for attempt in read_attempts(path)[1:]:
            state = attempt.outcome or "running"
            events.append((attempt.start, f"{path.stem}: attempt {attempt.number}, {state}"))
    for step in STEPS:
        file = step.directory(run) / MANIFEST
        if read_manifest(step.directory(run)) and file.is_file():
            events.append((file.stat().st_mtime, f"{step.name}: done"))
    return [
        f"{time.strftime('%H:%M:%S', time.localtime(moment))}  {text}"
        for moment, text in sorted(events)
    ]


def _log_events(path: Path) -> list[tuple[float, str]]:
    """Time and text of the warnings, errors and validations at the end of a log."""
    events = []
    for line in _tail(path).splitlines():
        parts = line.split(" ", 3)
        if len(parts) < 4:
            continue
        date, clock_time, level, text = parts
        if level not in ("WARNING", "ERROR") and "validation loss" not in text:
            continue
        try:
            moment = time.strptime(f"{date} {clock_time}", "%Y-%m-%d %H:%M:%S")
        except ValueError:
            continue
        events.append((time.mktime(moment), text))
    return events


def watch(run: RunDirectory, *, interval: float, once: bool) -> None:
    """Draw the run every `interval` seconds until it is finished, or once."""
    while True:
        view = read_view(run)
        width = os.get_terminal_size().columns if os.isatty(1) else 120
        text = render(view, width)
        print(text if once else f"\x1b[2J\x1b[H{text}", flush=True)
        if once or view.finished:
            return
        time.sleep(interval)
