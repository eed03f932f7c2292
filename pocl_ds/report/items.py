"""Evaluated items: every model's answer to each, and how sure a benchmark's mean is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.errors import ArtifactError
from pocl_ds.metrics.bootstrap import percentile_interval, resampled_means
from pocl_ds.report.max_samples import cut, parsed, weight
from pocl_ds.workflow.run_dir import RunDirectory


@dataclass(frozen=True)
class Item:
    """One question. answers: model -> (text under the first seed, its ROUGE-L x100, mean ROUGE-L
    x100 over seeds).
    """

    id: str
    question: str
    references: list[str]
    answers: dict[str, tuple[str, float, float]]


@dataclass(frozen=True)
class Benchmark:
    """total: items that were answered; items: those that the page holds, chosen by the hash of
    their id.

    asked: a fingerprint of ids and templated prompts. scores: model -> id -> mean ROUGE-L x100 over
    seeds. weight: bytes that the items take in the page.
    """

    name: str
    total: int
    items: list[Item]
    asked: str
    scores: dict[str, dict[str, float]]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    weight: int = 0


def read_benchmarks(
    run: RunDirectory, results: dict[str, Any], models: list[str], most: int, room: int
) -> list[Benchmark]:
    """Every benchmark of finished results; at most `most` items of each, whose texts take `room`
    bytes in all at most.
    """
    names = list(
        dict.fromkeys(name for model in models for name in results["models"][model]["benchmarks"])
    )
    return [
        _benchmark(run, name, models, results["seeds"], most, room // len(names)) for name in names
    ]


def _benchmark(
    run: RunDirectory, name: str, models: list[str], seeds: list[int], most: int, room: int
) -> Benchmark:
    first: dict[str, dict[str, Any]] = {}  # model -> id -> record of the first seed
    scores: dict[str, dict[str, float]] = {}
    for model in models:
        sums: dict[str, list[float]] = {}
        for seed in seeds:
            records = _answers(run.evaluation / model / f"{name}-seed{seed}.jsonl")
            first.setdefault(model, {record["id"]: record for record in records})
            for record in records:
                sums.setdefault(record["id"], []).append(100 * record["rouge_l"])
        scores[model] = {key: sum(values) / len(values) for key, values in sums.items()}
    common = sorted(
        (key for key in first[models[0]] if all(key in first[model] for model in models)),
        key=_place,
    )
    items, used = [], 0
    for key in common[:most]:
        record = first[models[0]][key]
        answers = {
            model: (
                cut(first[model][key]["response"]),
                100 * first[model][key]["rouge_l"],
                scores[model][key],
            )
            for model in models
        }
        question, references = (
            record.get("instruction") or record["prompt"],
            record["references"][:3],
        )
        item = Item(key, cut(question), [cut(text) for text in references], answers)
        size = weight(
            [key, item.question, *item.references, *(text for text, _, _ in answers.values())]
        )
        if used + size > room:
            break
        used += size
        items.append(item)
    asked = [(key, first[models[0]][key]["prompt"]) for key in sorted(first[models[0]])]
    intervals = {
        model: percentile_interval(resampled_means(np.array(list(scores[model].values())))) for model in models
    }
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return Benchmark(name, len(first[models[0]]), items, digest, scores, intervals, used)


def _answers(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing: run `pocl evaluate --model {path.parent.name}` again"
        )
    with path.open(encoding="utf-8") as stream:
        return list(parsed(path, stream))


def _place(key: str) -> bytes:
    """Where an item stands among all: by the hash of its id, so that no file's order decides what
    is shown.
    """
    return hashlib.sha256(str(key).encode("utf-8", "replace")).digest()
