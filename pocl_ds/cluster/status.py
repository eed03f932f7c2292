"""`pocl status`: the state of a submitted run's jobs, from squeue and the run's files. It needs no
accounting.
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
from pocl_ds.cluster.attempts import DONE, FAILED, RETRY, Attempt, read_attempts
from pocl_ds.cluster.job_runner import METRICS
from pocl_ds.cluster.submit import enter_submission, job_ids
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.curriculum.plan_step import optimizer_steps_by_stage
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.run_dir import RunDirectory

TAIL_LINES = 6  # of a failing rank's log
RECENT_STEPS = 20  # optimizer steps that a rate is averaged over
# Words of the table for the states of jobs that have ended.
STATE_WORDS = {
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "TIMEOUT": "timed out",
    "NODE_FAIL": "lost its node",
}
WAIT_REASONS = {
    "Resources": "free nodes (Resources)",
    "Priority": "jobs with a higher priority (Priority)",
    "BeginTime": "its begin time (BeginTime)",
}


@dataclass
class Row:
    """One job of a submitted run."""

    name: str
    ids: str = "-"
    state: str = ""
    attempt: str = "-"
    progress: str = ""
    notes: list[str] = field(default_factory=list)  # lines below the table
    live: bool = False  # whether it waits or runs
    gpu_hours: float | None = None  # of all attempts; None without GPUs


def status(run: RunDirectory) -> list[Row]:
    """A row for each job of the last submission. Raises ArtifactError for a run that was never
    submitted.
    """
    submission = enter_submission(run)
    finished = finished_steps(run, load_recipe(str(run.recipe)))
    queue = scheduler.queue(job_ids(run)) if scheduler.available() else []
    rows: list[Row] = []
    for name in submission["jobs"]:
        spec = read_json(run.cluster / "jobs" / f"{name}.json")
        rows.append(_row(run, spec, finished, queue, rows))
    return rows


def _row(
    run: RunDirectory,
    spec: Mapping[str, Any],
    finished: Mapping[str, bool],
    queue: Sequence[scheduler.QueuedJob],
    rows: Sequence[Row],
) -> Row:
    """The row of one job. rows: of the jobs before it."""
    name = spec["name"]
    path = run.cluster / "jobs" / f"{name}.ids"
    ids = path.read_text().split() if path.is_file() else []
    jobs = [job for job in queue if job.array in ids]
    tasks = [read_attempts(file) for file in _attempt_files(run, name, bool(spec["array"]))]
    latest = [attempts[-1] for attempts in tasks if attempts]
    row = Row(
        name,
        ids=", ".join(ids) or "-",
        attempt=str(max(map(len, tasks))) if tasks else "-",
        progress=_progress(run, name, spec, finished),
        live=any(job.state not in scheduler.ENDED_STATES for job in jobs),
    )
    row.gpu_hours = _gpu_hours(tasks, spec, live=row.live)

    # Results decide the state first, then the scheduler if it still has the job, then attempts.
    failed = [attempt for attempt in latest if attempt.outcome == FAILED]
    if spec["steps"] and all(finished[step] for step in spec["steps"]):
        row.state = "done"
    elif row.live and failed:  # SLURM or its user requeued the job
        row.state, note = _queued_state(jobs, rows, spec)
        before = f"attempt {failed[-1].number}: {failed[-1].reason}"
        row.notes = [*([note] if note else []), before]
    elif failed:
        row.state = "failed"
        row.notes = [failed[-1].reason, *_log_tail(run, name, failed[-1])]
    elif jobs:
        row.state, note = _queued_state(jobs, rows, spec)
        row.notes = [note] if note else []
    else:
        row.state = _state_after_queue(ids, tasks, rows, spec)

    # Notes about attempts without a recorded end, and about retries.
    lost = [attempt.number for attempt in latest if attempt.end is None]
    if lost and not row.live and row.state in ("failed", "gone"):
        row.notes.append(
            f"attempt {lost[-1]} has no recorded end: its node may have failed, or the disk of "
            f"{run.path} may be full"
        )
    retried = [attempt for attempt in latest if attempt.outcome == RETRY]
    if retried and row.state not in ("done", "failed"):
        row.notes.append(f"attempt {retried[-1].number}: {retried[-1].reason}")
    return row


def _gpu_hours(
    tasks: Sequence[Sequence[Attempt]], spec: Mapping[str, Any], *, live: bool
) -> float | None:
    """GPU hours of a job's attempts so far. Those of an attempt without a recorded end are not
    known, unless it still runs.
    """
    gpus = spec["nodes"] * spec["gpus_per_node"]
    if not gpus:
        return None
    seconds = 0.0
    for attempts in tasks:
        for attempt in attempts:
            runs = live and attempt is attempts[-1]
            end = time.time() if attempt.end is None and runs else attempt.end
            seconds += max((end or attempt.start) - attempt.start, 0.0)
    return gpus * seconds / 3600


def state_of_run(rows: Sequence[Row]) -> str:
    """ "done", "live" while a job waits or runs, or "failed"."""
    if all(row.state == "done" for row in rows):
        return "done"
    return "live" if any(row.live for row in rows) else "failed"


def _queued_state(
    jobs: Sequence[scheduler.QueuedJob], rows: Sequence[Row], spec: Mapping[str, Any]
) -> tuple[str, str]:
    """The state of a job that squeue lists, and a note on why it waits or where it runs."""
    states: Counter[str] = Counter()
    for job in jobs:
        states[job.state] += max(len(job.tasks), 1)
    cause = _failed_predecessor(rows, spec)
    ended = set(states) <= set(STATE_WORDS) | {"FAILED"}
    if ended and cause and "COMPLETED" not in states:
        return "cancelled", f"since {cause} did not finish"

    # Tasks of an array in several states are counted.
    one_task = len(jobs) == 1 and len(jobs[0].tasks) <= 1
    if not one_task and len(states) > 1:
        return ", ".join(f"{count} {_state_word(state)}" for state, count in states.items()), ""
    job = jobs[0]
    if job.state == "RUNNING":
        return f"running {job.used}", f"on {job.nodes}"
    if job.state != "PENDING":
        return _state_word(job.state), ""
    if job.reason == "Dependency":
        return f"waits for {', '.join(spec['after'])}", ""
    start = f", from {job.start.replace('T', ' ')}" if job.start not in ("N/A", "") else ""
    reason = WAIT_REASONS.get(job.reason, job.reason)
    return "pending", f"pending for {reason} since {job.since.replace('T', ' ')}{start}"


def _state_word(state: str) -> str:
    return STATE_WORDS.get(state, state.lower())


def _state_after_queue(
    ids: Sequence[str],
    tasks: Sequence[Sequence[Attempt]],
    rows: Sequence[Row],
    spec: Mapping[str, Any],
) -> str:
    """The state of a job that squeue no longer lists."""
    if states := scheduler.final_states(ids).values():
        return ", ".join(sorted({_state_word(state) for state in states}))
    if tasks and all(attempts and attempts[-1].outcome == DONE for attempts in tasks):
        return "done"
    if _failed_predecessor(rows, spec):
        return "cancelled"
    return "gone" if ids else "-"


def _failed_predecessor(rows: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """The first job that this one waits for and that did not finish; empty for none."""
    failed_states = ("failed", "cancelled", STATE_WORDS["TIMEOUT"])
    names = [row.name for row in rows if row.name in spec["after"] and row.state in failed_states]
    return names[0] if names else ""


def _attempt_files(run: RunDirectory, name: str, array: bool) -> list[Path]:
    folder = run.cluster / "attempts"
    if array:
        return sorted(folder.glob(f"{name}-*.jsonl"))
    file = folder / f"{name}.jsonl"
    return [file] if file.is_file() else []


def _progress(
    run: RunDirectory, name: str, spec: Mapping[str, Any], finished: Mapping[str, bool]
) -> str:
    """Finished parts of an array; optimizer steps, rate and remaining time of a training; else
    finished steps.
    """
    # Arrays.
    if name == "score":
        return f"{len(list(run.scores.glob('*.manifest.json')))}/{len(spec['array'])} shards"
    if name == "cache-teacher":
        # A shard is finished when that of each teacher is.
        names = [
            {path.name for path in folder.glob("train-*.manifest.json")}
            for folder in run.teacher_cache.glob("*")
            if folder.is_dir()
        ]
        shards = set.intersection(*names) if names else set()
        return f"{len(shards)}/{len(spec['array'])} shards"
    if name == "evaluate":
        files = [
            path for path in run.evaluation.glob("*/*.manifest.json") if ".judge." not in path.name
        ]
        return f"{len(files)}/{len(spec['array'])} answer files"

    # Trainings, once they have metrics.
    path = run.path / METRICS.get(name, "") / "metrics.jsonl"
    if name not in METRICS or not path.is_file():
        return f"{sum(finished[step] for step in spec['steps'])}/{len(spec['steps'])} steps"
    if not (records := read_metrics(path)[-RECENT_STEPS:]):
        return ""
    record, total = records[-1], _optimizer_steps(run, name)
    rate = median(record["tokens_per_second"] for record in records)
    parts = [
        f"step {record['step']}{f'/{total}' if total else ''}",
        f"loss {record['loss']:.3f}",
        f"{rate:.0f} tokens/s",
    ]
    if total and total > record["step"]:
        seconds = median(record["seconds"] for record in records)
        parts.append(f"ETA {format_duration((total - record['step']) * seconds)}")
    return ", ".join(parts)


def _optimizer_steps(run: RunDirectory, name: str) -> int | None:
    """Optimizer steps of a training, None if unknown."""
    if name == "init-student":
        return int(load_recipe(str(run.recipe)).student.heal_steps) or None
    return sum(optimizer_steps_by_stage(run, name)) or None


def _log_tail(run: RunDirectory, name: str, attempt: Attempt) -> list[str]:
    """The end of a failed attempt's log, from the rank that wrote last."""
    logs = sorted(
        run.logs.glob(f"{name}*-a{attempt.number}-*-rank-*.log"),
        key=lambda path: path.stat().st_mtime,
    )
    for path in reversed(logs):
        text = path.read_text(errors="replace")
        if lines := [line for line in text.splitlines() if line.strip()]:
            return [f"{path}:", *(f"  {line[:160]}" for line in lines[-TAIL_LINES:])]
    return []
