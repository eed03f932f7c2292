"""What a run has to tell: its artifacts, read as they are. A part that is missing or unfinished
becomes a sentence.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.config import ReportConfig
from pocl_ds.errors import ArtifactError
from pocl_ds.report.history import History, Spent, read_history, spent_by_stage
from pocl_ds.report.items import Benchmark, Item, read_benchmarks
from pocl_ds.report.max_samples import Samples, read_samples
from pocl_ds.report.sample_visits import times_seen
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import Manifest, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

Floats = NDArray[np.float64]
COLUMNS = (
    "step",
    "stage",
    "loss",
    "kd",
    "ce",
    "temperature",
    "sft_ratio",
    "lr",
    "grad_norm",
    "tokens_per_second",
)
# Order of the models in tables and examples, and what a reader calls them.
MODELS = {
    "initial": "student before",
    "student": "student after",
    "baseline": "plain KD",
    "teacher": "teacher",
}


@dataclass(frozen=True)
class Curves:
    """Training metrics: column -> value of every step, and the validation records."""

    steps: dict[str, Floats]
    validation: list[dict[str, Any]]

    @property
    def last(self) -> int:
        """The newest step."""
        return int(self.steps["step"][-1])


@dataclass(frozen=True)
class Ranking:
    """Difficulty of every sample, in the order of the ranking. bounds: subset i is [bounds[i],
    bounds[i + 1]).
    """

    rouge_l: Floats
    cross_entropy: Floats
    bounds: list[int]
    ends: tuple[str, str] = ("easiest", "hardest")  # of the first and the last subset


@dataclass
class Facts:
    """Everything that the pages show. `missing` holds a sentence for each part that is not there."""

    manifests: dict[str, Manifest]
    plan: dict[str, Any] | None = None
    curves: Curves | None = None
    baseline: Curves | None = None
    ranking: Ranking | None = None
    results: dict[str, Any] | None = None
    benchmarks: list[Benchmark] = field(
        default_factory=list
    )  # the first is the one that headlines tell of
    samples: Samples | None = None
    seen: NDArray[np.int64] | None = None  # draws of each sample, easiest first
    spent: list[Spent] = field(default_factory=list)
    history: History = field(default_factory=lambda: History({}, []))
    missing: list[str] = field(default_factory=list)

    @property
    def benchmark(self) -> str:
        """Name of the benchmark that headlines tell of."""
        return self.benchmarks[0].name if self.benchmarks else ""

    def examples(self, count: int) -> list[Item]:
        """The first items of that benchmark."""
        return self.benchmarks[0].items[:count] if self.benchmarks else []


def read_facts(run: RunDirectory, config: ReportConfig, *, seed: int, window: int) -> Facts:
    """Read a run. seed, window: of the recipe, to know who was drawn. Raises ArtifactError where an
    artifact is damaged.
    """
    facts = Facts(manifests=_manifests(run))
    if "plan" in facts.manifests:
        facts.plan = read_json(run.plan / "plan.json")
    else:
        facts.missing.append("There is no plan yet, so stages and subsets are not shown.")
    facts.curves, facts.baseline = _curves(run.train), _curves(run.baseline)
    if facts.curves is None:
        facts.missing.append("Training has not started, so there are no curves.")
    elif "train" not in facts.manifests:
        facts.missing.append(
            f"Training is not finished: the curves end at step "
            f"{facts.curves.last}{_of_plan(facts.plan)}."
        )
    _hold_together(facts)
    room = config.max_text_mb * 1_000_000
    if facts.plan is not None and facts.curves is not None:
        facts.seen = times_seen(run, facts.plan, seed=seed, window=window, steps=facts.curves.last)
    if "evaluate" in facts.manifests:
        results = facts.results = read_json(run.evaluation / "results.json")
        models = [model for model in MODELS if model in results["models"]]
        found = read_benchmarks(
            run, results, models, max(config.max_items, config.num_examples), room // 3
        )
        facts.benchmarks = sorted(found, key=lambda one: one.name != "test")
    else:
        there = len(list(run.evaluation.glob("*/*.manifest.json")))
        part = f" ({there} answer files are there)" if there else ""
        facts.missing.append(
            f"There is no finished evaluation{part}, so results and answers are not shown: run "
            f"`pocl evaluate`."
        )
    _read_difficulty(
        run, facts, config.max_samples, room - sum(one.weight for one in facts.benchmarks)
    )
    facts.spent, facts.history = spent_by_stage(run, facts.manifests), read_history(run)
    return facts


def _hold_together(facts: Facts) -> None:
    """Leave out a plan of another ranking: who is in which subset would be wrong."""
    rank = facts.manifests.get("rank")
    if (
        facts.plan
        and rank
        and rank.info["samples"] != (planned := facts.plan["stages"][-1]["stop"])
    ):
        facts.missing.append(
            f"The plan was made for {planned} samples and the ranking holds "
            f"{rank.info['samples']}, so stages "
            "and subsets are not shown: run `pocl plan` again."
        )
        facts.plan = None


def _read_difficulty(run: RunDirectory, facts: Facts, most: int, room: int) -> None:
    """Ranking and samples, as far as they are there."""
    if "rank" not in facts.manifests:
        shards = len(list(run.scores.glob("shard-*.manifest.json")))
        part = f" ({shards} shards of scores are there)" if shards else ""
        facts.missing.append(f"The samples are not ranked yet{part}, so difficulty is not shown.")
        return
    info = facts.manifests["rank"].info
    if info.get("strategy") == "random":
        facts.missing.append(
            "The order is random: no sample was scored, so difficulty is not shown."
        )
    else:
        facts.ranking = _ranking(run, facts.plan, info)
    if "preprocess" not in facts.manifests:
        facts.missing.append("The data folder is not whole, so training samples are not shown.")
    elif most:
        facts.samples = read_samples(run, most, room)


def _of_plan(plan: dict[str, Any] | None) -> str:
    return f" of {plan['total_steps']}" if plan and "total_steps" in plan else ""


def metric_columns(path: Path) -> Curves | None:
    """The columns of a metrics.jsonl, read line by line; a half-written last line is left out. None
    for no steps.
    """
    columns = {name: array("d") for name in COLUMNS}
    validation = []
    with path.open(encoding="utf-8") as stream:
        for record in _records(stream):
            if record.get("kind") == "validation":
                validation.append(record)
            elif record.get("kind") == "step":
                for name, values in columns.items():
                    value = record.get(name)
                    values.append(float("nan") if value is None else float(value))
    if not columns["step"]:
        return None
    return Curves(
        {name: np.frombuffer(values, np.float64) for name, values in columns.items()}, validation
    )


def _records(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield record


def _manifests(run: RunDirectory) -> dict[str, Manifest]:
    """Stage -> its manifest, for the stages that are finished."""
    folders = {
        "preprocess": run.data,
        "init-student": run.models,
        "rank": run.ranking,
        "plan": run.plan,
        "train": run.train,
        "baseline": run.baseline,
        "evaluate": run.evaluation,
        "export": run.export,
    }
    found = {stage: read_manifest(folder) for stage, folder in folders.items()}
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}


def _curves(folder: Path) -> Curves | None:
    path = folder / "metrics.jsonl"
    return metric_columns(path) if path.is_file() else None


def _ranking(run: RunDirectory, plan: dict[str, Any] | None, info: dict[str, Any]) -> Ranking:
    path = run.ranking / "ranking.parquet"
    try:
        table = pq.read_table(path, columns=["rouge_l", "cross_entropy"])
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}): remove the folder and run `pocl rank` again"
        ) from None
    rouge, entropy = (
        table[name].to_numpy().astype(np.float64) for name in ("rouge_l", "cross_entropy")
    )
    stops = [int(stage["stop"]) for stage in plan["stages"]] if plan else [len(rouge)]
    ends = ("hardest", "easiest") if info.get("reverse") else ("easiest", "hardest")
    return Ranking(rouge, entropy, [0, *stops], ends)
