"""Cluster jobs of a run with their attempts, and time and memory by step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import Manifest, read_manifest
from pocl_ds.workflow.run_dir import STEP_FOLDERS, RunDirectory


@dataclass(frozen=True)
class StepCost:
    """Time and memory of a finished workflow step."""

    step: str
    seconds: float
    processes: int = 1  # in parallel
    host_bytes: int | None = None  # peak of one process, None if it was not recorded
    device_bytes: int | None = None


@dataclass(frozen=True)
class JobHistory:
    """Cluster jobs of a run; empty if the run was not submitted."""

    submission: dict[str, Any]
    attempts: list[dict[str, Any]]  # ordered by start

    @property
    def restarts(self) -> int:
        """Number of attempts after the first one of each job."""
        jobs = {(attempt["label"], attempt["submission"]) for attempt in self.attempts}
        return len(self.attempts) - len(jobs)

    @property
    def node_hours(self) -> float:
        """Nodes times hours of all attempts whose end is known."""
        return (
            sum((a["end"] - a["start"]) * len(a["nodes"]) for a in self.attempts if a.get("end"))
            / 3600
        )


def read_job_history(run: RunDirectory) -> JobHistory:
    """The last submission, and the attempts of all submissions."""
    submission = run.cluster / "submission.json"
    folders = [*sorted((run.cluster / "past").glob("*-attempts")), run.cluster / "attempts"]
    attempts = [
        {**attempt, "label": path.stem, "submission": number}
        for number, folder in enumerate(folders)
        for path in sorted(folder.glob("*.jsonl"))
        for attempt in _read_attempts(path)
    ]
    attempts.sort(key=lambda attempt: (attempt["start"], attempt["label"]))
    return JobHistory(read_json(submission) if submission.is_file() else {}, attempts)


def read_step_costs(run: RunDirectory, manifests: Mapping[str, Manifest]) -> list[StepCost]:
    """Costs of the steps that recorded their time, in the order of a run.

    Args:
        manifests: step -> manifest, of the finished steps.
    """
    parts = {step: [manifest] for step, manifest in manifests.items()}
    # Steps that work in shards have a manifest for each shard.
    for step, folder, pattern in (
        ("cache-teacher", run.teacher_cache, "*/*-of-*.manifest.json"),
        ("score", run.scores, "shard-*.manifest.json"),
        ("generate-teacher", run.teacher_responses, "manifest.json"),
    ):
        shards = [read_manifest(path.parent, path.name) for path in sorted(folder.glob(pattern))]
        if timed_shards := [shard for shard in shards if shard and "seconds" in shard.info]:
            parts[step] = timed_shards
    # Separate processes generate each model's answers.
    if "evaluate" in parts:
        parts["evaluate"] += [
            manifest
            for path in sorted(run.evaluation.glob("*/*.manifest.json"))
            if (manifest := read_manifest(path.parent, path.name))
        ]
    return [
        _step_cost(step, parts[step])
        for step in STEP_FOLDERS
        if step in parts and "seconds" in parts[step][0].info
    ]


def _step_cost(step: str, manifests: list[Manifest]) -> StepCost:
    infos = [manifest.info for manifest in manifests]
    # The seconds of `evaluate` include those of the answers.
    timed_infos = infos[:1] if step == "evaluate" else infos
    host, device = (
        [int(info[key]) for info in infos if info.get(key)]
        for key in ("peak_host_bytes", "peak_device_bytes")
    )
    return StepCost(
        step,
        sum(float(info["seconds"]) for info in timed_infos),
        int(infos[0].get("ranks", 1)) + int(infos[0].get("teacher_ranks", 0)),
        max(host, default=None),
        max(device, default=None),
    )


def _read_attempts(path: Path) -> list[dict[str, Any]]:
    """The attempts of one job. Later lines replace earlier ones; an incomplete line is ignored."""
    attempts: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            attempt = json.loads(line)
            attempts[attempt["number"]] = {"nodes": [], "start": 0.0, "end": None, **attempt}
        except (json.JSONDecodeError, TypeError, KeyError):
            continue
    return [attempts[number] for number in sorted(attempts)]
