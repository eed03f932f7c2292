"""`pocl fetch`: bring everything that a recipe reads from the Hub to this machine, so that jobs on
nodes without a network find it in the caches of HF_HOME.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.cluster.recipe_inputs import data_sections
from pocl_ds.config import ModelSource, Recipe
from pocl_ds.config.data import SourceConfig
from pocl_ds.data.source_files import source_files
from pocl_ds.data.sources import read_source_records
from pocl_ds.errors import DataError
from pocl_ds.evaluation.benchmarks import KNOWN_BENCHMARKS, TEST_SPLIT, benchmark_file
from pocl_ds.models.load import resolve_pinned_model

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class FetchedInput:
    """Something that a recipe reads. bytes: None where a library keeps it in its own files."""

    field: str
    name: str
    path: str
    bytes: int | None


def fetch_inputs(recipe: Recipe) -> Iterator[FetchedInput]:
    """Download the models, the data and the benchmarks of a recipe, and yield each when it is here.
    What is here already is not downloaded again. Raises ModelError or DataError.
    """
    models: dict[str, ModelSource] = {"student": recipe.student}
    if recipe.local_teacher:
        models |= recipe.local_teacher.named_sources
    for field, source in models.items():
        log.info("fetching %s: %s", field, source.label)
        path = resolve_pinned_model(source)
        yield FetchedInput(field, source.label, path, _size(Path(path)))
    yield from _fetch_data(recipe)
    yield from _fetch_benchmarks(recipe)


def _fetch_data(recipe: Recipe) -> Iterator[FetchedInput]:
    for field, section in data_sections(recipe).items():
        if recipe.data.streaming and _files(field, section) is None:
            log.info("%s is streamed: `pocl preprocess` needs the network", field)
            continue
        yield _fetch_records(field, section)


def _fetch_benchmarks(recipe: Recipe) -> Iterator[FetchedInput]:
    evaluate = recipe.evaluate
    for name, benchmark in evaluate.benchmarks.items():
        if benchmark.source == TEST_SPLIT:
            continue
        field = f"evaluate.benchmarks.{name}"
        if known := KNOWN_BENCHMARKS.get(benchmark.source):
            path = benchmark_file(known, evaluate.benchmark_dir, name, benchmark.hub_revision)
            yield FetchedInput(field, benchmark.source, str(path), _size(path))
            continue
        source = SourceConfig(
            source=benchmark.source,
            hub_subset=benchmark.hub_subset,
            hub_split=benchmark.hub_split,
            hub_revision=benchmark.hub_revision,
        )
        yield _fetch_records(field, source)


def _fetch_records(field: str, source: SourceConfig) -> FetchedInput:
    """Read the first record of a source, for which a dataset of the Hub is downloaded."""
    files = _files(field, source)
    log.info("fetching %s: %s", field, source.label)
    first: Any = next(itertools.islice(read_source_records(source, setting=field), 1), None)
    if first is None:
        raise DataError(f"{field}: {source.label} has no records: name another source")
    if files is None:
        return FetchedInput(field, source.label, "the cache of datasets", None)
    return FetchedInput(field, source.label, str(files[0]), sum(map(_size, files)))


def _files(field: str, source: SourceConfig) -> list[Path] | None:
    """The local files of a source; None for a dataset of the Hub."""
    return source_files(source.source, source.hub_split, needs_split=False, setting=field)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as the files that they name."""
    if path.is_file():
        return path.stat().st_size
    return sum(
        os.stat(Path(folder) / name).st_size
        for folder, _, names in os.walk(path, followlinks=False)
        for name in names
    )
