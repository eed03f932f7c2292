"""The benchmarks of a recipe that can be read without a download, to compare with training data."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pocl_ds.config import BenchmarkConfig, EvaluateConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.source_files import local_files
from pocl_ds.data.sources import read_samples
from pocl_ds.errors import DataError
from pocl_ds.evaluation.benchmarks import (
    KNOWN_BENCHMARKS,
    TEST_SPLIT,
    KnownBenchmark,
    benchmark_file,
)

HUB_DATASET = "is a dataset of the Hub, which the evaluation loads"


def read_local_benchmarks(
    config: EvaluateConfig,
) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """The items of each benchmark but the test split, by name; and why others cannot be read."""
    samples: dict[str, list[Sample]] = {}
    unreadable: dict[str, str] = {}
    for name, benchmark in config.benchmarks.items():
        if benchmark.source == TEST_SPLIT:
            continue
        try:
            samples[name] = _read(benchmark, config.benchmark_dir, name)
        except DataError as error:
            unreadable[name] = str(error)
    return samples, unreadable


def _read(benchmark: BenchmarkConfig, folder: str | None, name: str) -> list[Sample]:
    """All items. Raises DataError if they are not on this machine, or cannot be used."""
    known = KNOWN_BENCHMARKS.get(benchmark.source)
    if known:
        path = (
            _cached_file(known, benchmark)
            if folder is None
            else benchmark_file(known, folder, benchmark.source)
        )
        source = str(path)
    else:
        source = benchmark.source
        if not local_files(source):
            problem = "does not exist" if source.startswith(("/", ".", "~")) else HUB_DATASET
            raise DataError(f"{source} {problem}")
    items = read_samples(
        source,
        format=benchmark.format,
        fields={str(key): value for key, value in benchmark.fields.items()},
        hub_split=benchmark.hub_split,
        setting=f"evaluate.benchmarks.{name}.fields",
    )
    return list(islice(items, known.items if known else None))


def _cached_file(known: KnownBenchmark, benchmark: BenchmarkConfig) -> Path:
    """The file of a known benchmark in the cache of the Hub. Raises DataError without one."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(
        known.repository, known.hub_file, repo_type="dataset", revision=benchmark.hub_revision
    )
    if not isinstance(path, str):
        raise DataError(f"{known.repository} is not downloaded yet")
    return Path(path)
