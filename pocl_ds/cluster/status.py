"""What a submitted run is doing: from its own files and from squeue, so that it also works where
nothing is accounted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.attempts import AGAIN, DONE, FAILED, Attempt, read_attempts
from pocl_ds.cluster.job import METRICS
from pocl_ds.cluster.submit import enter_submission, job_ids
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.curriculum.plan_step import optimizer_steps_by_stage
from pocl_ds.runtime.tracking import aligned, read_metrics
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.run_dir import RunDirectory

LINES = 6  # of a failing rank's log
RECENT = 20  # steps that a rate is taken over
ENDED = {
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "TIMEOUT": "cut off",
    "NODE_FAIL": "lost its node",
}


@dataclass
class Row:
    """One job of the pipeline."""

    name: str
    ids: str = "-"
    state: str = ""
    attempt: str = "-"
    progress: str = ""
    notes: list[str] = field(default_factory=list)  # lines below the table
    live: bool = False  # whether it waits or runs


def status(run: RunDirectory) -> list[Row]:
    """A row for each job of the last submission. Raises ArtifactError for a run that was never
    submitted.
    """
    submission = enter_submission(run)
    recipe = load_recipe(str(run.recipe))
    done = finished_steps(run, recipe)
    queue = scheduler.queue(job_ids(run)) if scheduler.available() else []
    rows: list[Row] = []
    for name in submission["jobs"]:
        spec = read_json(run.cluster / "jobs" / f"{name}.json")
        rows.append(_row(run, spec, done, queue, rows))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows under a head, and what there is to say of each below."""
    head = Row("job", "id", "state", "attempt", "progress")
    cells = [[row.name, row.ids, row.state, row.attempt, row.progress] for row in [head, *rows]]
    notes = [
        f"{row.name}: {note}" if number == 0 else f"    {note}"
        for row in rows
        for number, note in enumerate(row.notes)
    ]
    return "\n".join([*aligned(cells), *([""] if notes else []), *notes])


def _row(
    run: RunDirectory,
    spec: Mapping[str, Any],
    done: Mapping[str, bool],
    queue: Sequence[scheduler.Queued],
    rows: Sequence[Row],
) -> Row:
    name = spec["name"]
    path = run.cluster / "jobs" / f"{name}.ids"
    ids = path.read_text().split() if path.is_file() else []
    jobs = [job for job in queue if job.array in ids]
    tasks = [read_attempts(file) for file in _attempt_files(run, name, bool(spec["array"]))]
    row = Row(
        name,
        ids=", ".join(ids) or "-",
        progress=_progress(run, name, spec, done),
        live=any(job.state not in scheduler.GONE for job in jobs),
    )
    if tasks:
        most = max(len(task) for task in tasks)
        row.attempt = str(most)
    failed = [task[-1] for task in tasks if task and task[-1].outcome == FAILED]
    if spec["steps"] and all(done[stage] for stage in spec["steps"]):
        row.state = "done"
    elif failed:
        row.state = "failed"
        row.notes = [failed[-1].why, *_tail(run, name, failed[-1])]
    elif jobs:
        row.state, note = _queued(jobs, rows, spec)
        row.notes = [note] if note else []
    else:
        row.state = _gone(ids, tasks, rows, spec)
    lost = [task[-1].number for task in tasks if task and task[-1].end is None]
    if lost and not row.live and row.state in ("failed", "gone"):
        row.notes.append(
            f"attempt {lost[-1]} left no word of its end: its node may be gone, or the disk of "
            f"{run.path} full"
        )
    waiting = [task[-1] for task in tasks if task and task[-1].outcome == AGAIN]
    if waiting and row.state not in ("done", "failed"):
        row.notes.append(f"attempt {waiting[-1].number}: {waiting[-1].why}")
    return row


def _queued(
    jobs: Sequence[scheduler.Queued], rows: Sequence[Row], spec: Mapping[str, Any]
) -> tuple[str, str]:
    """State, and why it waits."""
    states: Counter[str] = Counter()
    for job in jobs:
        states[job.state] += max(len(job.tasks), 1)
    if (
        set(states) <= set(ENDED) | {"FAILED"}
        and (cause := _cause(rows, spec))
        and "COMPLETED" not in states
    ):
        return "cancelled", f"since {cause} did not finish"
    if (len(jobs) == 1 and len(jobs[0].tasks) <= 1) or len(states) == 1:
        job = jobs[0]
        if job.state == "PENDING":
            when = f", from {job.start.replace('T', ' ')}" if job.start not in ("N/A", "") else ""
            if job.reason == "Dependency":
                return f"waits for {', '.join(spec['after'])}", ""
            return (
                "pending",
                f"pending for {_words(job.reason)} since {job.since.replace('T', ' ')}{when}",
            )
        word = ENDED.get(job.state, job.state.lower())
        return (
            f"{word} {job.used}" if job.state == "RUNNING" else word
        ), f"on {job.nodes}" if job.state == "RUNNING" else ""
    return ", ".join(
        f"{count} {ENDED.get(state, state.lower())}" for state, count in states.items()
    ), ""


def _gone(
    ids: Sequence[str],
    tasks: Sequence[Sequence[Attempt]],
    rows: Sequence[Row],
    spec: Mapping[str, Any],
) -> str:
    """The state of a job that the scheduler no longer knows."""
    accounted = [state for job, state in scheduler.accounted(ids).items()]
    if accounted:
        return ", ".join(sorted({ENDED.get(state, state.lower()) for state in accounted}))
    if tasks and all(task and task[-1].outcome == DONE for task in tasks):
        return "done"
    if _cause(rows, spec):
        return "cancelled"
    return "gone" if ids else "-"


def _cause(rows: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """The job before this one that ended badly."""
    return next(
        (
            row.name
            for row in rows
            if row.name in spec["after"] and row.state in ("failed", "cancelled", "cut off")
        ),
        "",
    )


def _words(reason: str) -> str:
    return {
        "Resources": "free nodes (Resources)",
        "Priority": "jobs before it (Priority)",
        "BeginTime": "its time to come (BeginTime)",
    }.get(reason, reason)


def _attempt_files(run: RunDirectory, name: str, array: bool) -> list[Path]:
    folder = run.cluster / "attempts"
    return (
        sorted(folder.glob(f"{name}-*.jsonl"))
        if array
        else [p for p in [folder / f"{name}.jsonl"] if p.is_file()]
    )


def _progress(
    run: RunDirectory, name: str, spec: Mapping[str, Any], done: Mapping[str, bool]
) -> str:
    """Steps, rate and time left of a training; finished pieces of an array."""
    if name == "score":
        return f"{len(list(run.scores.glob('*.manifest.json')))}/{len(spec['array'])} shards"
    if name == "cache-teacher":
        return f"{len(list(run.teacher_cache.glob('train-*.manifest.json')))}/{len(spec['array'])} shards"
    if name == "evaluate":
        answered = [
            path for path in run.evaluation.glob("*/*.manifest.json") if ".judge." not in path.name
        ]
        return f"{len(answered)}/{len(spec['array'])} answer files"
    path = run.path / METRICS.get(name, "") / "metrics.jsonl"
    if name not in METRICS or not path.is_file():
        return f"{sum(done[stage] for stage in spec['steps'])}/{len(spec['steps'])} stages"
    if not (records := read_metrics(path)[-RECENT:]):
        return ""
    last, total = records[-1], _total(run, name)
    words = [f"step {last['step']}{f'/{total}' if total else ''}", f"loss {last['loss']:.3f}"]
    words.append(f"{median(record['tokens_per_second'] for record in records):.0f} tokens/s")
    if total and total > last["step"]:
        left = (total - last["step"]) * median(record["seconds"] for record in records)
        words.append(
            f"ETA {time.strftime('%H:%M:%S', time.gmtime(left)) if left < 86400 else f'{left / 86400:.1f} days'}"
        )
    return ", ".join(words)


def _total(run: RunDirectory, name: str) -> int | None:
    """Steps of a training's plan."""
    if name == "init-student":
        return int(load_recipe(str(run.recipe)).student.heal_steps) or None
    return sum(optimizer_steps_by_stage(run, name)) or None


def _tail(run: RunDirectory, name: str, attempt: Attempt) -> list[str]:
    """The end of the failed attempt's logs: of the rank that said something last."""
    logs = sorted(
        run.logs.glob(f"{name}*-a{attempt.number}-*-rank-*.log"),
        key=lambda path: path.stat().st_mtime,
    )
    for path in reversed(logs):
        if lines := [
            line for line in path.read_text(errors="replace").splitlines() if line.strip()
        ]:
            return [f"{path}:", *(f"  {line[:160]}" for line in lines[-LINES:])]
    return []
