"""Evaluated items: every model's answer to each, and intervals of the benchmarks' means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.errors import ArtifactError
from pocl_ds.metrics.bootstrap import percentile_interval, resampled_means
from pocl_ds.report.samples import embedded_bytes, parse_lines, truncate
from pocl_ds.workflow.run_dir import RunDirectory

MAX_REFERENCES = 3  # of an item on the page


@dataclass(frozen=True)
class Answer:
    """A model's answer to an item."""

    text: str  # with the first seed
    rouge_l: float  # x100, with the first seed
    mean_rouge_l: float  # x100, over seeds


@dataclass(frozen=True)
class Item:
    """An item on the page."""

    id: str
    prompt: str
    references: list[str]
    answers: dict[str, Answer]  # by model


@dataclass(frozen=True)
class BenchmarkItems:
    """The items of one benchmark."""

    name: str
    total: int  # items that were answered
    items: list[Item]  # those on the page
    prompts_digest: str  # of ids and rendered prompts
    # Model -> 95% interval of mean ROUGE-L x100 over items.
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    embedded_bytes: int = 0


def read_benchmark_items(
    run: RunDirectory,
    results: dict[str, Any],
    models: Sequence[str],
    max_items: int,
    max_bytes: int,
) -> list[BenchmarkItems]:
    """Read the items of all benchmarks of finished results.

    Args:
        max_items: limit for each benchmark; the items are chosen by the hash of their ids.
        max_bytes: limit of the texts of all benchmarks.

    Raises:
        ArtifactError: answers are missing or damaged.
    """
    names = list(
        dict.fromkeys(name for model in models for name in results["models"][model]["benchmarks"])
    )
    seeds = results["seeds"]
    return [
        _read_benchmark(run, name, models, seeds, max_items, max_bytes // len(names))
        for name in names
    ]


def _read_benchmark(
    run: RunDirectory,
    name: str,
    models: Sequence[str],
    seeds: Sequence[int],
    max_items: int,
    max_bytes: int,
) -> BenchmarkItems:
    # Read the answers: model -> item id -> record of the first seed, and mean score over seeds.
    records: dict[str, dict[str, dict[str, Any]]] = {}
    means: dict[str, dict[str, float]] = {}
    for model in models:
        scores: dict[str, list[float]] = {}
        for seed in seeds:
            answers = _read_answers(run.evaluation / model / f"{name}-seed{seed}.jsonl")
            records.setdefault(model, {record["id"]: record for record in answers})
            for record in answers:
                scores.setdefault(record["id"], []).append(100 * record["rouge_l"])
        means[model] = {item: sum(values) / len(values) for item, values in scores.items()}

    # Take items that every model has answered, in the order of their hashes, until space is used.
    ids = list(records[models[0]])
    common = [item for item in ids if all(item in records[model] for model in models)]
    items, used_bytes = [], 0
    for item_id in _in_hash_order(common)[:max_items]:
        item = _item(item_id, {model: records[model][item_id] for model in models}, means)
        texts = [item.id, item.prompt, *item.references, *(a.text for a in item.answers.values())]
        if used_bytes + embedded_bytes(texts) > max_bytes:
            break
        used_bytes += embedded_bytes(texts)
        items.append(item)

    prompts = [(item, records[models[0]][item]["prompt"]) for item in sorted(ids)]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    intervals = {
        model: percentile_interval(resampled_means(np.array(list(means[model].values()))))
        for model in models
    }
    return BenchmarkItems(name, len(ids), items, digest, intervals, used_bytes)


def _item(
    item_id: str, records: dict[str, dict[str, Any]], means: dict[str, dict[str, float]]
) -> Item:
    answers = {
        model: Answer(truncate(record["response"]), 100 * record["rouge_l"], means[model][item_id])
        for model, record in records.items()
    }
    record = next(iter(records.values()))
    return Item(
        item_id,
        truncate(record.get("instruction") or record["prompt"]),
        [truncate(text) for text in record["references"][:MAX_REFERENCES]],
        answers,
    )


def _read_answers(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing: run `pocl evaluate --model {path.parent.name}` again"
        )
    with path.open(encoding="utf-8") as stream:
        return list(parse_lines(path, stream))


def _in_hash_order(ids: Sequence[str]) -> list[str]:
    """Ids by the hash of each, so that the order of a file does not decide which are shown."""
    return sorted(ids, key=lambda item: hashlib.sha256(item.encode("utf-8", "replace")).digest())
