"""Answers on disk: one JSONL file per model, benchmark and seed, one item per line.

Each file has a manifest, which records how the answers were generated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import EvaluateConfig, PromptConfig
from pocl_ds.errors import ArtifactError
from pocl_ds.metrics.text import distinct_n, repetition_rate
from pocl_ds.workflow.manifest import Manifest, read_part
from pocl_ds.workflow.run_dir import RunDirectory

HELD_OUT_LOSS = "held_out_loss.json"  # beside the answers


def answers_file(run: RunDirectory, model: str, benchmark: str, seed: int) -> Path:
    """The file of one model's answers to one benchmark with one seed."""
    return run.evaluation / model / f"{benchmark}-seed{seed}.jsonl"


def answers_manifest(file: Path) -> Manifest | None:
    """The manifest of a file of answers; None if they are unfinished or damaged."""
    return read_part(file.parent, f"{file.name}.manifest.json")


def read_answers(file: Path) -> list[dict[str, Any]]:
    """The records in a file of answers. Raises ArtifactError if it is missing, unfinished or
    damaged.
    """
    if answers_manifest(file) is None:
        raise ArtifactError(
            f"{file} is missing, unfinished or damaged: run `pocl evaluate --model "
            f"{file.parent.name}` first"
        )
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def answer_settings(prompt: PromptConfig, config: EvaluateConfig) -> dict[str, Any]:
    """The settings that must be equal for answers to be comparable: prompt, decoding, backend."""
    template = prompt.template
    file = Path(os.path.expanduser(template))
    if file.suffix == ".jinja" and file.is_file():
        # Identify a file by its content, since two files may have one name.
        template = f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    return {
        "template": template,
        "chat_template_kwargs": prompt.chat_template_kwargs,
        "max_prompt_tokens": prompt.max_prompt_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
        "span": config.span,
        "backend": config.generation.backend,
        "dtype": config.generation.dtype,
    }


def summarize_answers(
    records_by_seed: Sequence[Sequence[dict[str, Any]]], manifests: Sequence[Manifest | None]
) -> dict[str, Any]:
    """Statistics of one model's answers to one benchmark.

    ROUGE-L and exact match are in percent. Deviations are standard deviations (n - 1) over seeds.

    Args:
        records_by_seed: the records of each seed's file.
        manifests: the manifests of the same files.

    Returns:
        Values by name. distinct_1 and distinct_2 are computed over all answers of a seed, then
        averaged over seeds. answer_tokens is the mean length with EOS; tokens_per_second leaves
        out everything but generation. unfinished_thoughts: percentage of the answers that do not
        end their thought, with `evaluate.span: answer` alone. sources: see `summarize_sources`.
    """
    rouge = [100 * statistics.fmean(r["rouge_l"] for r in records) for records in records_by_seed]
    exact = [
        100 * statistics.fmean(r["exact_match"] for r in records) for records in records_by_seed
    ]
    responses = [[record["response"] for record in records] for records in records_by_seed]
    all_responses = [text for seed_responses in responses for text in seed_responses]
    infos = [manifest.info for manifest in manifests if manifest is not None]
    tokens, seconds = (
        sum(info[name] for info in infos) for name in ("tokens", "generation_seconds")
    )
    first_records = records_by_seed[0]
    return {
        "samples": len(first_records),
        "rouge_l": statistics.fmean(rouge),
        "rouge_l_deviation": statistics.stdev(rouge) if len(rouge) > 1 else None,
        "rouge_l_by_seed": rouge,
        "rouge_tokenizer": infos[0]["settings"]["rouge_tokenizer"],
        "exact_match": statistics.fmean(exact),
        "exact_match_by_seed": exact,
        "words": statistics.fmean(len(text.split()) for text in all_responses),
        "repetition_rate": statistics.fmean(repetition_rate(text) for text in all_responses),
        "distinct_1": statistics.fmean(distinct_n(texts, 1) for texts in responses),
        "distinct_2": statistics.fmean(distinct_n(texts, 2) for texts in responses),
        "references": statistics.fmean(len(record["references"]) for record in first_records),
        "cut_prompts": max(info["cut_prompts"] for info in infos),
        "answer_tokens": tokens / len(all_responses),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        **_unfinished_thoughts(records_by_seed),
        **summarize_sources(records_by_seed),
    }


def _unfinished_thoughts(records_by_seed: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """The value of this name; empty if thoughts were not looked at."""
    flags = [
        record["unfinished_thought"]
        for record in itertools.chain.from_iterable(records_by_seed)
        if "unfinished_thought" in record
    ]
    return {"unfinished_thoughts": 100 * statistics.fmean(flags)} if flags else {}


def summarize_sources(
    records_by_seed: Sequence[Sequence[dict[str, Any]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Items and mean ROUGE-L in percent of each source of a mixture (`data.sources`), as `sources`;
    empty if the items have no source.
    """
    scores: dict[str, list[float]] = {}
    for record in itertools.chain.from_iterable(records_by_seed):
        if "source" in record:
            scores.setdefault(record["source"], []).append(record["rouge_l"])
    if not scores:
        return {}
    seeds = len(records_by_seed)
    return {
        "sources": {
            name: {"samples": len(values) // seeds, "rouge_l": 100 * statistics.fmean(values)}
            for name, values in sorted(scores.items())
        }
    }
