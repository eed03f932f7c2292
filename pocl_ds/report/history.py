"""Where a run was: its jobs and their attempts, seconds and memory by stage. Files are read as they
are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import Manifest, read_manifest
from pocl_ds.workflow.run_dir import STEP_FOLDERS, RunDirectory


@dataclass(frozen=True)
class Spent:
    """What a stage took. Memory is the peak of one process, None where the stage did not record it."""

    stage: str
    seconds: float
    processes: int = 1  # that worked side by side all the time
    host_bytes: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True)
class History:
    """Jobs of a run that was submitted; empty for one that was not."""

    submission: dict[str, Any]
    attempts: list[dict[str, Any]]  # in order of their start

    @property
    def restarts(self) -> int:
        """Attempts beyond the first of each job."""
        return len(self.attempts) - len({(a["label"], a["round"]) for a in self.attempts})

    @property
    def node_hours(self) -> float:
        """Nodes times hours of the attempts that ended; those whose end is unknown count nothing."""
        return (
            sum((a["end"] - a["start"]) * len(a["nodes"]) for a in self.attempts if a.get("end"))
            / 3600
        )


def read_history(run: RunDirectory) -> History:
    """The submission and every attempt, also those of earlier submissions."""
    submission = run.cluster / "submission.json"
    folders = [*sorted((run.cluster / "past").glob("*-attempts")), run.cluster / "attempts"]
    attempts = [
        {**attempt, "label": path.stem, "round": number}
        for number, folder in enumerate(folders)
        for path in sorted(folder.glob("*.jsonl"))
        for attempt in _attempts(path)
    ]
    attempts.sort(key=lambda attempt: (attempt["start"], attempt["label"]))
    return History(read_json(submission) if submission.is_file() else {}, attempts)


def spent_by_stage(run: RunDirectory, manifests: dict[str, Manifest]) -> list[Spent]:
    """In the order of the way of a run; stages that do not say how long they took are left out."""
    parts: dict[str, list[Manifest]] = {stage: [manifest] for stage, manifest in manifests.items()}
    for stage, folder, pattern in (
        ("cache-teacher", run.teacher_cache, "*-of-*.manifest.json"),
        ("score", run.scores, "shard-*.manifest.json"),
        ("generate-teacher", run.teacher_responses, "manifest.json"),
    ):
        shards = [read_manifest(path.parent, path.name) for path in sorted(folder.glob(pattern))]
        if found := [shard for shard in shards if shard and "seconds" in shard.info]:
            parts[stage] = found
    if "evaluate" in parts:  # the answers were written by processes of their own, before
        parts["evaluate"] += [
            one
            for path in sorted(run.evaluation.glob("*/*.manifest.json"))
            if (one := read_manifest(path.parent, path.name))
        ]
    return [
        _spent(stage, parts[stage])
        for stage in STEP_FOLDERS
        if stage in parts and "seconds" in parts[stage][0].info
    ]


def _spent(stage: str, manifests: list[Manifest]) -> Spent:
    infos = [manifest.info for manifest in manifests]
    counted = infos[:1] if stage == "evaluate" else infos  # its own seconds are the sum of all
    host, device = (
        [int(info[key]) for info in infos if info.get(key)]
        for key in ("peak_host_bytes", "peak_device_bytes")
    )
    return Spent(
        stage,
        sum(float(info["seconds"]) for info in counted),
        int(infos[0].get("ranks", 1)),
        max(host, default=None),
        max(device, default=None),
    )


def _attempts(path: Path) -> list[dict[str, Any]]:
    """Those of one job; the newest line of a number counts, a torn last line does not."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            attempt = json.loads(line)
            found[attempt["number"]] = {"nodes": [], "start": 0.0, "end": None, **attempt}
        except (json.JSONDecodeError, TypeError, KeyError):
            continue
    return [found[number] for number in sorted(found)]
