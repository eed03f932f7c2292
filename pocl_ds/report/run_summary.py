"""Everything that a report shows of a run, read from its files.

A part that is missing or unfinished becomes a sentence in `RunSummary.missing`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.config import ReportConfig
from pocl_ds.config.registry import FILE_STRATEGY, LENGTH_STRATEGY
from pocl_ds.errors import ArtifactError
from pocl_ds.report.history import JobHistory, StepCost, read_job_history, read_step_costs
from pocl_ds.report.items import BenchmarkItems, Item, read_benchmark_items
from pocl_ds.report.sample_visits import count_sample_visits
from pocl_ds.report.samples import SampleRows, read_sample_rows
from pocl_ds.report.stage_rankings import StageRankingRecord, read_stage_rankings
from pocl_ds.runtime.metrics import format_steps, missing_steps, read_records
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import Manifest, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

Floats = NDArray[np.float64]
# Columns of metrics.jsonl with the seconds of the parts of a step.
STEP_PARTS = tuple(
    f"{part}_seconds" for part in ("data", "teacher", "student", "optimizer", "wait")
)
# Columns of metrics.jsonl that the report shows. Losses are in nats per token.
COLUMNS = (
    "step",
    "stage",
    "loss",
    "kd_loss",
    "sft_loss",
    "temperature",
    "sft_ratio",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "tokens_per_second_per_rank",
    "mfu",
    "load_imbalance",
    "seconds",
    *STEP_PARTS,
)
# Ranking strategy that needs no scores -> what the order follows.
NOT_SCORED = {
    "random": "The order is random",
    LENGTH_STRATEGY: "The order follows the length of the responses",
    FILE_STRATEGY: "The order follows the difficulty in a file (ranking.scores)",
}
# Model -> its label, in the order of tables and examples.
MODEL_LABELS = {
    "initial": "student before",
    "student": "student after",
    "baseline": "student after plain KD",
    "teacher": "teacher",
}


@dataclass(frozen=True)
class TrainingCurves:
    """Training metrics: column -> value of every optimizer step, and validation records."""

    steps: dict[str, Floats]
    validation: list[dict[str, Any]]

    @property
    def last_step(self) -> int:
        """The newest optimizer step."""
        return int(self.steps["step"][-1])


@dataclass(frozen=True)
class DifficultyRanking:
    """Difficulty of every sample, in the order of the ranking."""

    rouge_l: Floats
    cross_entropy: Floats
    bounds: list[int]  # subset i is [bounds[i], bounds[i + 1])
    end_labels: tuple[str, str] = ("easiest", "hardest")  # of the first and the last subset
    rouge_tokenizer: str = "rouge_score"


@dataclass
class RunSummary:
    """What both pages show. A part that the run lacks is None or empty."""

    manifests: dict[str, Manifest]  # by finished step
    plan: dict[str, Any] | None = None
    curves: TrainingCurves | None = None
    baseline_curves: TrainingCurves | None = None
    ranking: DifficultyRanking | None = None
    results: dict[str, Any] | None = None
    benchmarks: list[BenchmarkItems] = field(default_factory=list)  # the main one first
    samples: SampleRows | None = None
    stage_rankings: list[StageRankingRecord] = field(default_factory=list)
    sample_visits: NDArray[np.int64] | None = None  # [samples], easiest first
    step_costs: list[StepCost] = field(default_factory=list)
    history: JobHistory = field(default_factory=lambda: JobHistory({}, []))
    missing: list[str] = field(default_factory=list)  # a sentence for each missing part

    @property
    def main_benchmark(self) -> str:
        """Name of the benchmark in headlines: the test split, if it was evaluated."""
        return self.benchmarks[0].name if self.benchmarks else ""

    @property
    def train_info(self) -> dict[str, Any]:
        """What training recorded in its manifest; empty if it is not finished."""
        return self.manifests["train"].info if "train" in self.manifests else {}

    @property
    def total_seconds(self) -> float:
        """Time of all steps."""
        return sum(cost.seconds for cost in self.step_costs)

    def examples(self, count: int) -> list[Item]:
        """The first items of the main benchmark."""
        return self.benchmarks[0].items[:count] if self.benchmarks else []


def read_run_summary(
    run: RunDirectory, config: ReportConfig, *, seed: int, window: int
) -> RunSummary:
    """Read a run.

    Args:
        seed, window: the recipe's seed and train.length_window, which decide the order of samples.

    Raises:
        ArtifactError: a finished result is damaged.
    """
    summary = RunSummary(manifests=_read_manifests(run))
    _read_training(run, summary, seed=seed, window=window)
    max_bytes = config.max_text_mb * 1_000_000
    _read_evaluation(run, summary, max(config.max_items, config.num_examples), max_bytes // 3)
    # Samples take the space that the evaluated items leave.
    max_bytes -= sum(benchmark.embedded_bytes for benchmark in summary.benchmarks)
    _read_difficulty(run, summary, config.max_samples, max_bytes)
    summary.step_costs = read_step_costs(run, summary.manifests)
    summary.history = read_job_history(run)
    return summary


def read_training_curves(path: Path) -> TrainingCurves | None:
    """The columns of a metrics.jsonl; None if it has no steps. Damaged lines are ignored."""
    columns = {name: array("d") for name in COLUMNS}
    validation = []
    for record in read_records(path):
        if record.get("kind") == "validation":
            validation.append(record)
        elif record.get("kind") == "step":
            for name, values in columns.items():
                value = record.get(name)
                values.append(float("nan") if value is None else float(value))
    if not columns["step"]:
        return None
    steps = {name: np.frombuffer(values, np.float64) for name, values in columns.items()}
    return TrainingCurves(steps, validation)


def _read_training(run: RunDirectory, summary: RunSummary, *, seed: int, window: int) -> None:
    """Read plan, curves and sample visits."""
    if "plan" in summary.manifests:
        summary.plan = read_json(run.plan / "plan.json")
    else:
        summary.missing.append("There is no plan yet, so stages and subsets are not shown.")
    summary.curves, summary.baseline_curves = (
        read_training_curves(path) if path.is_file() else None
        for path in (run.train / "metrics.jsonl", run.baseline / "metrics.jsonl")
    )
    if summary.curves is None:
        summary.missing.append("Training has not started, so there are no curves.")
    elif "train" not in summary.manifests:
        plan = summary.plan or {}
        of_total = f" of {plan['total_steps']}" if "total_steps" in plan else ""
        summary.missing.append(
            "Training is not finished: the curves end at optimizer step "
            f"{summary.curves.last_step}{of_total}."
        )
    if summary.curves and (lost := missing_steps(read_records(run.train / "metrics.jsonl"))):
        summary.missing.append(
            f"The records of {len(lost)} optimizer steps are lost ({format_steps(lost)}), so the "
            "curves have a gap."
        )
    # Leave out a plan that belongs to another ranking: its subsets would be wrong.
    rank = summary.manifests.get("rank")
    if summary.plan and rank:
        planned, ranked = summary.plan["subset_ends"][-1], rank.info["samples"]
        if planned != ranked:
            summary.missing.append(
                f"The plan was made for {planned} samples and the ranking has {ranked}, so stages "
                "and subsets are not shown: run `pocl plan` again."
            )
            summary.plan = None
    if summary.plan is not None:
        summary.stage_rankings = read_stage_rankings(
            run, len(summary.plan["stages"]), summary.manifests.get("train")
        )
    if summary.plan is not None and summary.curves is not None and rank:
        summary.sample_visits = count_sample_visits(
            run,
            summary.plan,
            seed=seed,
            window=window,
            steps=summary.curves.last_step,
            ranked_stages=[ranking.stage for ranking in summary.stage_rankings],
        )


def _read_evaluation(
    run: RunDirectory, summary: RunSummary, max_items: int, max_bytes: int
) -> None:
    """Read results and evaluated items."""
    if "evaluate" not in summary.manifests:
        files = len(list(run.evaluation.glob("*/*.manifest.json")))
        progress = f" ({files} files of answers are finished)" if files else ""
        summary.missing.append(
            f"There is no finished evaluation{progress}, so results and answers are not shown: run "
            "`pocl evaluate`."
        )
        return
    results = summary.results = read_json(run.evaluation / "results.json")
    models = [model for model in MODEL_LABELS if model in results["models"]]
    benchmarks = read_benchmark_items(run, results, models, max_items, max_bytes)
    summary.benchmarks = sorted(benchmarks, key=lambda benchmark: benchmark.name != "test")


def _read_difficulty(
    run: RunDirectory, summary: RunSummary, max_samples: int, max_bytes: int
) -> None:
    """Read the ranking and the training samples."""
    if "rank" not in summary.manifests:
        shards = len(list(run.scores.glob("shard-*.manifest.json")))
        progress = f" ({shards} shards are scored)" if shards else ""
        summary.missing.append(
            f"The samples are not ranked yet{progress}, so difficulty is not shown."
        )
        return
    info = summary.manifests["rank"].info
    if reason := NOT_SCORED.get(info.get("strategy", "")):
        summary.missing.append(
            f"{reason}: no sample was scored, so ROUGE-L and cross-entropy are not shown."
        )
    else:
        summary.ranking = _read_ranking(run, summary.plan, info)
    if "preprocess" not in summary.manifests:
        summary.missing.append(
            "The data folder is incomplete, so training samples are not shown: run "
            "`pocl preprocess`."
        )
    elif max_samples:
        summary.samples = read_sample_rows(run, max_samples, max_bytes)


def _read_ranking(
    run: RunDirectory, plan: dict[str, Any] | None, info: dict[str, Any]
) -> DifficultyRanking:
    path = run.ranking / "ranking.parquet"
    try:
        table = pq.read_table(path, columns=["rouge_l", "cross_entropy"])
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}): remove the folder and run `pocl rank` again"
        ) from None
    rouge_l, cross_entropy = (
        table[name].to_numpy().astype(np.float64) for name in ("rouge_l", "cross_entropy")
    )
    ends = plan["subset_ends"] if plan else [len(rouge_l)]
    end_labels = ("hardest", "easiest") if info.get("reverse") else ("easiest", "hardest")
    rouge_tokenizer = info.get("rouge_tokenizer", "rouge_score")  # a random order has none
    return DifficultyRanking(rouge_l, cross_entropy, [0, *ends], end_labels, rouge_tokenizer)


def _read_manifests(run: RunDirectory) -> dict[str, Manifest]:
    """Step -> manifest, of the finished steps that have one manifest."""
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
    manifests = {step: read_manifest(folder) for step, folder in folders.items()}
    return {step: manifest for step, manifest in manifests.items() if manifest is not None}
