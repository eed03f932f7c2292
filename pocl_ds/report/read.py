"""What a run has to tell: its artifacts, read as they are. A part that is missing or unfinished becomes a sentence."""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.artifacts import Manifest, RunDirectory, read_json, read_manifest
from pocl_ds.errors import ArtifactError

Floats = NDArray[np.float64]
COLUMNS = ("step", "stage", "loss", "kd", "ce", "tau", "alpha", "lr", "grad_norm", "tokens_per_second")
# Order of the models in tables and examples, and what a reader calls them.
MODELS = {"initial": "student before", "student": "student after", "baseline": "plain KD", "teacher": "teacher"}


@dataclass(frozen=True)
class Curves:
    """Training metrics: column -> value of every step, and the validation records."""

    steps: dict[str, Floats]
    validation: list[dict[str, Any]]


@dataclass(frozen=True)
class Ranking:
    """Difficulty of every sample, in the order of the ranking. bounds: subset i is [bounds[i], bounds[i + 1])."""

    rouge_l: Floats
    cross_entropy: Floats
    bounds: list[int]
    ends: tuple[str, str] = ("easiest", "hardest")  # of the first and the last subset


@dataclass(frozen=True)
class Example:
    """One prompt with what each model answered: model -> (text, ROUGE-L x100)."""

    question: str
    references: list[str]
    answers: dict[str, tuple[str, float]]


@dataclass
class Facts:
    """Everything that the pages show. `missing` holds a sentence for each part that is not there."""

    manifests: dict[str, Manifest]
    plan: dict[str, Any] | None = None
    curves: Curves | None = None
    baseline: Curves | None = None
    ranking: Ranking | None = None
    results: dict[str, Any] | None = None
    benchmark: str = ""  # the one that the examples come from
    examples: list[Example] = field(default_factory=list)
    seconds: list[tuple[str, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_facts(run: RunDirectory, examples: int) -> Facts:
    """Read a run. Raises ArtifactError where a finished artifact is damaged."""
    facts = Facts(manifests=_manifests(run))
    if "plan" in facts.manifests:
        facts.plan = read_json(run.plan / "plan.json")
    else:
        facts.missing.append("There is no plan yet, so stages and subsets are not shown.")
    facts.curves, facts.baseline = _curves(run.train), _curves(run.baseline)
    if facts.curves is None:
        facts.missing.append("Training has not started, so there are no curves.")
    elif "train" not in facts.manifests:
        facts.missing.append("Training is not finished: the curves end where it stands.")
    if "rank" in facts.manifests and facts.manifests["rank"].info.get("strategy") == "random":
        facts.missing.append("The order is random: no sample was scored, so difficulty is not shown.")
    elif "rank" in facts.manifests:
        facts.ranking = _ranking(run, facts.plan, facts.manifests["rank"].info)
    else:
        facts.missing.append("The samples are not ranked yet, so difficulty is not shown.")
    if "evaluate" in facts.manifests:
        facts.results = read_json(run.evaluation / "results.json")
        facts.benchmark, facts.examples = _examples(run, facts.results, examples)
    else:
        facts.missing.append("There is no finished evaluation, so results and answers are not shown: run `pocl evaluate`.")
    facts.seconds = _seconds(run, facts.manifests)
    return facts


def metric_columns(path: Path) -> Curves | None:
    """The columns of a metrics.jsonl, read line by line; a half-written last line is left out. None for no steps."""
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
    return Curves({name: np.frombuffer(values, np.float64) for name, values in columns.items()}, validation)


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
        "data": run.data, "prepare": run.models, "rank": run.ranking, "plan": run.plan, "train": run.train,
        "baseline": run.baseline, "evaluate": run.evaluation, "export": run.export,
    }  # fmt: skip
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
        raise ArtifactError(f"{path} cannot be read ({error}): remove the folder and run `pocl rank` again") from None
    rouge, entropy = (table[name].to_numpy().astype(np.float64) for name in ("rouge_l", "cross_entropy"))
    stops = [int(stage["stop"]) for stage in plan["stages"]] if plan else [len(rouge)]
    ends = ("hardest", "easiest") if info.get("reverse") else ("easiest", "hardest")
    return Ranking(rouge, entropy, [0, *stops], ends)


def _examples(run: RunDirectory, results: dict[str, Any], count: int) -> tuple[str, list[Example]]:
    """The first `count` items by hash of their id, under the first seed, with every model's answer."""
    models = [model for model in MODELS if model in results["models"]]
    names = list(dict.fromkeys(name for model in models for name in results["models"][model]["benchmarks"]))
    if not names or not count:
        return "", []
    benchmark = "test" if "test" in names else names[0]
    answers = {}
    for model in models:
        path = run.evaluation / model / f"{benchmark}-seed{results['seeds'][0]}.jsonl"
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: run `pocl evaluate --model {model}` again")
        with path.open(encoding="utf-8") as stream:
            first = heapq.nsmallest(count, _records(stream), key=_place)
        answers[model] = {record["id"]: record for record in first}
    common = [key for key in answers[models[0]] if all(key in answered for answered in answers.values())]
    examples = []
    for key in common:
        record = answers[models[0]][key]
        texts = {model: (answers[model][key]["response"], 100 * answers[model][key]["rouge_l"]) for model in models}
        examples.append(Example(record.get("instruction") or record["prompt"], list(record["references"]), texts))
    return benchmark, examples


def _place(record: dict[str, Any]) -> bytes:
    """Where an item stands among all: by the hash of its id, so that no file's order decides what is shown."""
    return hashlib.sha256(str(record["id"]).encode()).digest()


def _seconds(run: RunDirectory, manifests: dict[str, Manifest]) -> list[tuple[str, float]]:
    """Seconds by stage, in the order of the way of a run; stages that do not say how long they took are left out."""
    times = {stage: manifest.info.get("seconds") for stage, manifest in manifests.items()}
    taught = [read_manifest(path.parent, path.name) for path in sorted(run.teacher.glob("*-of-*.manifest.json"))]
    if taught:
        times["teach"] = sum(one.info["seconds"] for one in taught if one)
    shards = [read_manifest(path.parent, path.name) for path in sorted(run.scores.glob("shard-*.manifest.json"))]
    scored = [shard.info["seconds"] for shard in shards if shard is not None and "seconds" in shard.info]
    if scored:
        times["score"] = sum(scored)
    order = ("data", "prepare", "teach", "respond", "score", "rank", "plan", "train", "baseline", "evaluate", "export")
    return [(stage, float(seconds)) for stage in order if (seconds := times.get(stage)) is not None]
