"""Answers on disk: a file of a model, a benchmark and a seed, an item a line, with a manifest that
says how they came about.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.errors import ArtifactError
from pocl_ds.metrics.text import distinct_n, repetition_rate
from pocl_ds.workflow.manifest import Manifest, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def answers_file(run: RunDirectory, model: str, benchmark: str, seed: int) -> Path:
    """Where the answers of one model to one benchmark with one seed lie."""
    return run.evaluation / model / f"{benchmark}-seed{seed}.jsonl"


def answers_manifest(file: Path) -> Manifest | None:
    """What stands beside finished answers; None where they are unfinished."""
    return read_manifest(file.parent, f"{file.name}.manifest.json")


def read_answers(file: Path) -> list[dict[str, Any]]:
    """The items of a file. Raises ArtifactError where it is missing or unfinished."""
    if not file.is_file() or answers_manifest(file) is None:
        raise ArtifactError(
            f"{file} is missing or unfinished: run `pocl evaluate --model {file.parent.name}` first"
        )
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def settings(prompt: PromptConfig, config: EvaluateConfig) -> dict[str, Any]:
    """What two answers must have in common to be compared: how the prompt was made, how and by what
    text was drawn.
    """
    file = Path(os.path.expanduser(prompt.template))
    name = prompt.template
    if file.suffix == ".jinja" and file.is_file():  # by its text: files of one name may differ
        name = f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    return {
        "template": name,
        "chat_template_kwargs": prompt.chat_template_kwargs,
        "max_prompt_tokens": prompt.max_prompt_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
        "backend": config.generation.backend,
        "dtype": config.generation.dtype,
    }


def summary(
    runs: Sequence[Sequence[dict[str, Any]]], manifests: Sequence[Manifest | None]
) -> dict[str, Any]:
    """Of the answers of each seed: means and standard deviations over seeds, ROUGE-L and exact
    match times 100.

    distinct_1, distinct_2: of all answers of a seed together. tokens_per_second: of writing alone;
    answer_tokens: of one answer, its EOS included.
    """
    rouge = [100 * statistics.fmean(record["rouge_l"] for record in records) for records in runs]
    exact = [
        100 * statistics.fmean(record["exact_match"] for record in records) for records in runs
    ]
    texts = [[record["response"] for record in records] for records in runs]
    every = [text for of_seed in texts for text in of_seed]
    infos = [manifest.info for manifest in manifests if manifest is not None]
    tokens, seconds = (
        sum(info[name] for info in infos) for name in ("tokens", "generation_seconds")
    )
    return {
        "samples": len(runs[0]),
        "rouge_l": statistics.fmean(rouge),
        "rouge_l_deviation": statistics.stdev(rouge) if len(rouge) > 1 else None,
        "rouge_l_by_seed": rouge,
        "exact_match": statistics.fmean(exact),
        "words": statistics.fmean(len(text.split()) for text in every),
        "repetition_rate": statistics.fmean(repetition_rate(text) for text in every),
        "distinct_1": statistics.fmean(distinct_n(of_seed, 1) for of_seed in texts),
        "distinct_2": statistics.fmean(distinct_n(of_seed, 2) for of_seed in texts),
        "references": statistics.fmean(len(record["references"]) for record in runs[0]),
        "cut_prompts": max(info["cut_prompts"] for info in infos),
        "answer_tokens": tokens / len(every),
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }
