"""Benchmarks: where the known ones come from, and which items every model answers.

The items depend on their ids alone, so all models and seeds answer the same ones, however a file
is ordered.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pocl_ds.config import BenchmarkConfig, EvaluateConfig
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.sources import read_samples
from pocl_ds.errors import ArtifactError, DataError, RecipeError
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

TEST_SPLIT = "test"  # the source of the benchmark that is the run's own test split


@dataclass(frozen=True)
class KnownBenchmark:
    """A benchmark of MiniLLM (arXiv 2306.08543), on the Hub or in a folder."""

    repository: str  # dataset on the Hub
    # Names that its file may have in evaluate.benchmark_dir; the last is that of MiniLLM.
    files: tuple[str, ...]
    items: int  # as published

    @property
    def hub_file(self) -> str:
        """Name of the file in the repository: MiniLLM's without the first folder."""
        return self.files[-1].partition("/")[2]


KNOWN_BENCHMARKS = {
    "dolly": KnownBenchmark(
        "MiniLLM/dolly", ("dolly.jsonl", "eval_dolly500.jsonl", "dolly/valid.jsonl"), 500
    ),
    "self_inst": KnownBenchmark(
        "MiniLLM/self-inst",
        ("self_inst.jsonl", "eval_selfinst242.jsonl", "self-inst/valid.jsonl"),
        242,
    ),
    "vicuna": KnownBenchmark(
        "MiniLLM/Vicuna", ("vicuna.jsonl", "eval_vicuna80.jsonl", "vicuna/valid.jsonl"), 80
    ),
    # Both only with references of at least 11 tokens.
    "sni": KnownBenchmark(
        "MiniLLM/sinst", ("sni.jsonl", "eval_sni_11plus.jsonl", "sinst/11_/valid.jsonl"), 1694
    ),
    "unni": KnownBenchmark(
        "MiniLLM/uinst", ("unni.jsonl", "eval_unni_11plus.jsonl", "uinst/11_/valid.jsonl"), 10_000
    ),
}
# The published benchmark is the beginning of a longer file.
BEGINNING_OF_FILE = "unni"


def check_benchmark_names(names: Iterable[str]) -> None:
    """Check that every name can be a file name. Raises RecipeError."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise RecipeError(
                f"evaluate.benchmarks name {name!r} cannot be a file name: use letters, digits, "
                "`.`, `_`, `-`"
            )


def benchmark_samples(run: RunDirectory, config: EvaluateConfig, name: str) -> list[Sample]:
    """The items of a benchmark: at most evaluate.max_samples, chosen by the hash of their ids.

    Raises:
        DataError: an item has no reference, or the data is not available.
        ArtifactError: the benchmark has no items.
    """
    benchmark = config.benchmarks[name]
    samples = _read_benchmark(run, benchmark, config.benchmark_dir, name)
    if not samples:
        raise ArtifactError(
            f"benchmark {benchmark.source!r} has no samples: set data.test_fraction or "
            "evaluate.benchmarks"
        )
    rows = select_by_hash((sample.id for sample in samples), config.max_samples)
    return [samples[row] for row in rows]


def skip_empty_test_split(
    run: RunDirectory, config: EvaluateConfig, *, warn: bool = True
) -> EvaluateConfig:
    """The evaluation without the test split if that has no items, and a warning that says so.

    An evaluation without any benchmark has no results. Raises ArtifactError if the test split is a
    benchmark and the run has no finished data.
    """
    remaining = {name: b for name, b in config.benchmarks.items() if b.source != TEST_SPLIT}
    empty = [name for name in config.benchmarks if name not in remaining]
    if not empty:
        return config
    path = run.data / f"{TEST_SPLIT}.jsonl"
    if not path.is_file():
        raise ArtifactError(f"{run.data} has no finished data: run `pocl preprocess` first")
    if path.stat().st_size:
        return config
    if warn:
        left_out = f"benchmark {', '.join(empty)} is left out of the evaluation"
        nothing = "there is nothing to evaluate, and the student is exported without results"
        log.warning(
            "the data has no test samples, so %s: raise data.test_fraction, name a file in "
            "data.test, or another benchmark in evaluate.benchmarks",
            left_out if remaining else nothing,
        )
    return config.model_copy(update={"benchmarks": remaining})


def external_benchmarks(run: RunDirectory, config: EvaluateConfig) -> dict[str, list[Sample]]:
    """The items of every benchmark but the test split, by name. Raises as `benchmark_samples`."""
    return {
        name: benchmark_samples(run, config, name)
        for name, benchmark in config.benchmarks.items()
        if benchmark.source != TEST_SPLIT
    }


def _prompt_key(sample: Sample) -> str:
    """The texts of a sample's prompt, alike for every way to divide them into fields."""
    texts = [*(message.content for message in sample.prompt), sample.input]
    return unicodedata.normalize("NFC", " ".join(" ".join(texts).split()))


def count_seen_in_training(
    run: RunDirectory, benchmarks: Mapping[str, Sequence[Sample]]
) -> dict[str, int]:
    """Number of items by benchmark whose prompt is also a training prompt.

    Logs a warning, since a model may know their answers by heart. Reads data/train.jsonl once.
    """
    keys = {name: [_prompt_key(s) for s in samples] for name, samples in benchmarks.items()}
    benchmark_keys = {key for names_keys in keys.values() for key in names_keys}
    seen_keys = set[str]()
    if benchmark_keys:
        training_keys = (_prompt_key(s) for s in read_sample_file(run.data / "train.jsonl"))
        seen_keys = {key for key in training_keys if key in benchmark_keys}
    counts = {
        name: sum(key in seen_keys for key in names_keys) for name, names_keys in keys.items()
    }
    for name, count in counts.items():
        if count:
            log.warning(
                "benchmark %s: %d of %d items have the prompt of a training sample, so its scores "
                "also measure memorization",
                name,
                count,
                len(keys[name]),
            )
    return counts


def benchmark_file(
    benchmark: KnownBenchmark, folder: str | None, name: str, revision: str | None = None
) -> Path:
    """The file of a known benchmark, from `folder`, or from the Hub if that is None.

    Raises:
        DataError: the file is not there, or cannot be downloaded.
    """
    if folder is None:
        return _download(benchmark, name, revision)
    for file in benchmark.files:
        path = Path(os.path.expanduser(folder)) / file
        if path.is_file():
            return path
    raise DataError(
        f"benchmark {name!r} is not in evaluate.benchmark_dir {folder} (looked for "
        f"{', '.join(benchmark.files)}): put it there, or name its file, as in "
        f"evaluate.benchmarks.{name}=my.jsonl"
    )


def local_benchmark_files(config: EvaluateConfig) -> list[Path]:
    """Files in evaluate.benchmark_dir that known benchmarks are read from; missing ones are left
    out.
    """
    files = []
    for benchmark in config.benchmarks.values():
        if benchmark.source in KNOWN_BENCHMARKS and config.benchmark_dir is not None:
            known = KNOWN_BENCHMARKS[benchmark.source]
            with suppress(DataError):
                files.append(benchmark_file(known, config.benchmark_dir, benchmark.source))
    return files


def _read_benchmark(
    run: RunDirectory, benchmark: BenchmarkConfig, folder: str | None, name: str
) -> list[Sample]:
    """All items of a benchmark."""
    if benchmark.source == TEST_SPLIT:
        return list(read_sample_file(run.data / "test.jsonl"))
    fields = {str(key): value for key, value in benchmark.fields.items()}
    setting = f"evaluate.benchmarks.{name}.fields"

    # A benchmark of the user: a file or a dataset of the Hub.
    known = KNOWN_BENCHMARKS.get(benchmark.source)
    if known is None:
        samples = read_samples(
            benchmark.source,
            format=benchmark.format,
            fields=fields,
            setting=setting,
            hub_subset=benchmark.hub_subset,
            hub_split=benchmark.hub_split,
            hub_revision=benchmark.hub_revision,
        )
        return list(samples)

    # A known benchmark: warn if it does not have the published number of items.
    path = benchmark_file(known, folder, benchmark.source, benchmark.hub_revision)
    samples = read_samples(str(path), format=benchmark.format, fields=fields, setting=setting)
    items = list(islice(samples, known.items + 1))
    is_longer = len(items) > known.items and benchmark.source != BEGINNING_OF_FILE
    if is_longer or len(items) < known.items:
        log.warning(
            "benchmark %s: %s holds %s items, the published one %d: do not compare with published "
            "numbers",
            name,
            path,
            "more" if is_longer else len(items),
            known.items,
        )
    return items[: known.items]


def _download(benchmark: KnownBenchmark, name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(
                benchmark.repository, benchmark.hub_file, repo_type="dataset", revision=revision
            )
        )
    except Exception as error:  # network, offline mode, access: a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"benchmark {name!r} ({benchmark.repository}, {benchmark.hub_file}) cannot be "
            f"downloaded from the Hub ({type(error).__name__}: {reason}): check the network, or "
            "set evaluate.benchmark_dir to a folder that has it"
        ) from None
