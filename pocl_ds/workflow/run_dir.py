"""The run directory: where each step writes its result. Steps exchange data only through its
files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import read_json

# Step -> its folder, in the order of a run.
STEP_FOLDERS = {
    "preprocess": "data",
    "init-student": "models",
    "generate-teacher": "teacher_responses",
    "score": "scores",
    "rank": "ranking",
    "plan": "plan",
    "cache-teacher": "teacher_cache",
    "train": "train",
    "baseline": "baseline",
    "evaluate": "evaluation",
    "export": "export",
    "report": "report",
}
MODELS_PREFIX = "run://"  # of a path relative to the run's models/


class RunDirectory:
    """Paths of one run. data: a copy of its tokenized data on another disk."""

    def __init__(self, path: Path | str, *, data: Path | None = None) -> None:
        self.path, self._data = Path(path), data

    def step_directory(self, step: str) -> Path:
        """Where a step writes its result."""
        return self.path / STEP_FOLDERS[step]

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def input_digests(self) -> Path:
        """Digests of the files that the recipe names."""
        return self.path / "input_digests.json"

    @property
    def inputs(self) -> Path:
        """Models and records that were passed to `pocl_ds.distill` in memory."""
        return self.path / "inputs"

    @property
    def data(self) -> Path:
        """{train,validation,test}.jsonl and their tokens."""
        return self._data or self.path / "data"

    @property
    def models(self) -> Path:
        """models.json: where the teacher and the initial student are."""
        return self.path / "models"

    @property
    def teacher_cache(self) -> Path:
        """A folder for each teacher: its cached outputs, by split and shard, and its head."""
        return self.path / "teacher_cache"

    @property
    def teacher_responses(self) -> Path:
        """The teacher's responses to the training prompts, as a tokenized split."""
        return self.path / "teacher_responses"

    @property
    def scores(self) -> Path:
        """shard-00000-of-00004.jsonl, ..."""
        return self.path / "scores"

    @property
    def ranking(self) -> Path:
        """ranking.parquet and order.npy."""
        return self.path / "ranking"

    @property
    def plan(self) -> Path:
        """plan.json and baseline.json."""
        return self.path / "plan"

    @property
    def train(self) -> Path:
        """checkpoints/, metrics.jsonl and final/; adapter/ with student.lora."""
        return self.path / "train"

    @property
    def baseline(self) -> Path:
        """The same as `train`, for the plain KD baseline."""
        return self.path / "baseline"

    @property
    def evaluation(self) -> Path:
        """results.json, and the answers of each model."""
        return self.path / "evaluation"

    @property
    def export(self) -> Path:
        """The student as a Hugging Face folder."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """report.html and report.md."""
        return self.path / "report"

    @property
    def cluster(self) -> Path:
        """Submitted jobs: profile, scripts, frozen code, attempts."""
        return self.path / "cluster"

    @property
    def logs(self) -> Path:
        """Logs of steps and of SLURM jobs."""
        return self.path / "logs"


def read_models(run: RunDirectory) -> dict[str, Any]:
    """Paths of the teacher and the initial student. Raises ArtifactError if models.json is missing
    or damaged.
    """
    path = run.models / "models.json"
    tree = read_json(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("student"), str):
        raise ArtifactError(
            f"{path} is damaged (it names no student): remove its folder and run `pocl "
            "init-student` again"
        )
    if tree["student"].startswith(MODELS_PREFIX):
        tree["student"] = str(run.models / tree["student"].removeprefix(MODELS_PREFIX))
    return tree


def movable_model_path(run: RunDirectory, path: str) -> str:
    """How models.json names a model: relative to models/ if the run created it, so that the run
    directory can be moved.
    """
    if not Path(path).is_relative_to(run.models):
        return path
    return MODELS_PREFIX + os.path.relpath(path, run.models)
