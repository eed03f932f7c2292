"""The step `preprocess`: from the data sources to three tokenized splits.

The hash of the first prompt of a conversation decides its split, and whether a limited selection
includes it (see `splits`). So neither depends on the order of a file, and no prompt of test or
validation is a prompt of training. Paraphrases of one prompt may be: near-duplicates, and
references that are also training responses, are counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.held_out_overlap import Overlap, find_overlap, log_overlap
from pocl_ds.data.read_sources import InvalidSamples, SourceReader, mixture_names
from pocl_ds.data.sample_spool import SPLITS, SampleSpool
from pocl_ds.data.sample_tokenizer import EVENTS, SampleTokenizer
from pocl_ds.data.split_sources import SplitLabels
from pocl_ds.data.splits import smallest_rows
from pocl_ds.data.tokenize_splits import (
    TEACHER_DIRECTORY,
    SplitResult,
    SplitTokenizer,
    log_split,
    save_split_array,
)
from pocl_ds.data.tokenize_workers import default_num_workers
from pocl_ds.data.tokenizer_digest import tokenizer_digests
from pocl_ds.errors import DataError
from pocl_ds.workflow.files import atomic_directory, remove_partial_directories
from pocl_ds.workflow.manifest import Manifest, finished_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

__all__ = ["HELD_OUT", "SPLITS", "TEACHER_DIRECTORY", "preprocess"]
HELD_OUT = ("validation", "test")
# Reads the benchmarks of a recipe: samples by name, and why others cannot be read.
ReadBenchmarks: TypeAlias = Callable[[], tuple[Mapping[str, Sequence[Sample]], Mapping[str, str]]]


def preprocess(
    run: RunDirectory,
    data: DataConfig,
    prompt: PromptConfig,
    tokenizer: Any,
    fingerprint: str,
    teacher_tokenizer: Any = None,
    commits: Mapping[str, str] | None = None,
    *,
    teacher_end_ids: Sequence[int] = (),
    read_benchmarks: ReadBenchmarks | None = None,
) -> Manifest:
    """Read, split and tokenize the data into data/, which appears complete or not at all.

    teacher_tokenizer: also write the training and validation splits in its tokens, row by row, to
    data/teacher. teacher_end_ids: the student's ids of the
    tokens that end a teacher's turns, which end the student's too. commits: commit of each model on
    the Hub, which the manifest records for later steps. read_benchmarks: reads what the models will
    be evaluated on, to compare with training. Raises DataError if no training samples remain.
    """
    if manifest := finished_manifest(run.data, fingerprint):
        return manifest
    start = time.monotonic()
    student = SampleTokenizer(tokenizer, prompt, special_tokens_in_text=data.special_tokens_in_text)
    teacher = None
    if teacher_tokenizer is not None:
        # The teacher gets every sample that the student gets.
        teacher = SampleTokenizer(
            teacher_tokenizer,
            prompt.model_copy(update={"overlong": "truncate_text"}),
            special_tokens_in_text=data.special_tokens_in_text,
            keep_all=True,
        )
    remove_partial_directories(run.data)
    with atomic_directory(run.data) as folder:
        info = {
            "source": [source.label for source in data.training_sources],
            "tokenizer": tokenizer.name_or_path,
            "eos_id": tokenizer.eos_token_id,
            "end_of_turn_ids": list(dict.fromkeys([*student.end_of_turn_ids, *teacher_end_ids])),
            "teacher_end_of_turn_ids": teacher.end_of_turn_ids if teacher else [],
            "tokenizers": {"student": tokenizer_digests(tokenizer)}
            | ({"teacher": tokenizer_digests(teacher_tokenizer)} if teacher else {}),
            "vocabulary": len(tokenizer),
            "commits": dict(commits or {}),
            **_write_data(data, folder, student, teacher, read_benchmarks),
            "seconds": time.monotonic() - start,
        }
        return write_manifest(folder, "preprocess", fingerprint, info=info)


def _write_data(
    data: DataConfig,
    folder: Path,
    student: SampleTokenizer,
    teacher: SampleTokenizer | None,
    read_benchmarks: ReadBenchmarks | None,
) -> dict[str, Any]:
    """Write the splits, and return what the manifest records of them."""
    invalid = InvalidSamples(data.on_invalid)
    num_workers = data.num_workers or default_num_workers()
    with SampleSpool(folder / ".samples") as spool:
        # Assign every sample of the sources to a split, and limit the splits.
        reader = SourceReader(data, student.render_prompt, spool, invalid, num_workers)
        reader.read()
        rows = _select_rows(spool, data)

        # Compare training with what is held out.
        compared = data.decontaminate != "none"
        benchmarks, unreadable = read_benchmarks() if read_benchmarks and compared else ({}, {})
        overlap = find_overlap(
            spool, rows, benchmarks, near_duplicates=compared, num_workers=num_workers
        )
        log_overlap(overlap, rows, data.decontaminate)
        for name, reason in unreadable.items():
            log.warning("benchmark %s is not compared with the training data: %s", name, reason)
        rows, removed = _decontaminate(rows, overlap, data.decontaminate)

        # Tokenize the splits.
        split_tokenizer = SplitTokenizer(student, teacher, invalid, num_workers)
        results = _write_splits(split_tokenizer, spool, rows, folder, mixture_names(data))
        domains = _write_domains(spool, results, folder, reader) if data.has_domains else None
    invalid.log()
    if not results["train"].counts.samples:
        events = results["train"].counts.events
        dropped = "; ".join(f"{count} {EVENTS[name]}" for name, count in events.items())
        raise DataError(
            f"{_source_field(data)} leaves no training samples{dropped and f' ({dropped})'}: "
            "change data.validation_fraction, data.test_fraction, data.decontaminate or "
            "prompt.overlong, raise prompt.max_prompt_tokens, or give more data"
        )
    return {
        "records": {name: asdict(counts) for name, counts in reader.counts.items()},
        "invalid_records": invalid.reasons.total(),
        "invalid_reasons": dict(invalid.reasons),
        "omitted_prompts": reader.omitted,
        "near_duplicates": overlap.near_duplicates(),
        "removed_near_duplicates": removed,
        "unreadable_benchmarks": dict(unreadable),
        "references_in_training": {
            split: overlap.references_in_training()[split] for split in HELD_OUT
        },
        "splits": {split: result.info() for split, result in results.items()},
        "domains": domains,
    }


def _source_field(data: DataConfig) -> str:
    return f"data.source={data.source}" if data.source else "data.sources"


def _select_rows(spool: SampleSpool, data: DataConfig) -> dict[str, NDArray[np.int64]]:
    """Rows of each split, at most data.max_*_samples."""
    keys, ties = spool.selection_keys, spool.ties
    return {
        split: smallest_rows(spool.rows(split), keys, ties, getattr(data, f"max_{split}_samples"))
        for split in SPLITS
    }


def _decontaminate(
    rows: dict[str, NDArray[np.int64]], overlap: Overlap, mode: str
) -> tuple[dict[str, NDArray[np.int64]], dict[str, int]]:
    """The rows without near-duplicates on the side that data.decontaminate names, and how many
    were removed.
    """
    by_mode: dict[str, dict[str, NDArray[np.int64] | None]] = {
        "train": {"train": overlap.training_rows},
        "test": {split: overlap.items[split].near_duplicates for split in HELD_OUT},
    }
    removed = {}
    for split, places in by_mode.get(mode, {}).items():
        if places is not None and len(places):
            rows = {**rows, split: np.delete(rows[split], places)}
            removed[split] = len(places)
            log.warning(
                "%s: %s samples are left out (data.decontaminate=%s)",
                split,
                f"{len(places):,}",
                mode,
            )
    return rows, removed


def _write_splits(
    tokenizer: SplitTokenizer,
    spool: SampleSpool,
    rows: Mapping[str, NDArray[np.int64]],
    folder: Path,
    sources: Sequence[str],
) -> dict[str, SplitResult]:
    """Tokenize the splits. sources: names of the sources of a mixture."""
    results: dict[str, SplitResult] = {}
    held_out_prompts = np.empty(0, np.uint64)
    # Cutting can make prompts of two splits equal, so training comes last and does without them.
    for split in ("test", "validation", "train"):
        result = tokenizer.write(spool, rows[split], folder, split, held_out_prompts)
        prompts = result.prompt_hashes
        held_out_prompts = np.union1d(held_out_prompts, prompts[prompts != 0])
        save_split_array(folder, f"{split}.prompt_keys", spool.keys[result.rows])
        if sources:
            SplitLabels(tuple(sources), spool.sources[result.rows]).write(folder, split)
        results[split] = result
    for split in SPLITS:
        log_split(split, results[split])
    return {split: results[split] for split in SPLITS}


def _write_domains(
    spool: SampleSpool, results: Mapping[str, SplitResult], folder: Path, reader: SourceReader
) -> dict[str, Mapping[str, int]]:
    """Write the domain of each sample, and return the number of samples of each domain by split."""
    numbers, counts = spool.domains, {}
    for split, result in results.items():
        labels = SplitLabels(tuple(reader.domains), numbers[result.rows])
        labels.write(folder, split, "domains")
        counts[split] = labels.counts
    listed = ", ".join(f"{name} {count:,}" for name, count in counts["train"].items())
    log.info("domains of the training samples: %s", listed)
    return counts
