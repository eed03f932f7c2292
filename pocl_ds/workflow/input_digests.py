"""Digests of the files and folders that a recipe names. They enter fingerprints, so that a changed
file of the same name is noticed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pocl_ds.config import ModelSource, Recipe
from pocl_ds.evaluation.benchmarks import local_benchmark_files
from pocl_ds.workflow.manifest import MANIFEST

# Files up to this size are digested completely, larger ones by evenly spaced blocks.
FULL_DIGEST_BYTES, BLOCK_BYTES, BLOCK_COUNT = 256 << 20, 1 << 18, 128
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".jinja", ".gguf")
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.py")


def content_digest(path: Path) -> list[Any]:
    """Size in bytes and sha256 of a user's file.

    Above 256 MiB the digest covers both ends and evenly spaced blocks between them, so that it
    takes well under a second at any size. Each file is read once per process.
    """
    status = path.stat()
    return [status.st_size, _sampled_digest(str(path), status.st_size, status.st_mtime_ns)]


@functools.cache
def _sampled_digest(path: str, size: int, _modified_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        if size <= FULL_DIGEST_BYTES:
            while block := stream.read(1 << 22):
                digest.update(block)
        else:
            for number in range(BLOCK_COUNT):
                stream.seek((size - BLOCK_BYTES) * number // (BLOCK_COUNT - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def data_files(recipe: Recipe) -> list[Any]:
    """Digests of the data files and of a template file."""
    data, template = recipe.data, recipe.prompt.template
    template_file = template if template.endswith(".jinja") else None
    return _local_files((data.source, data.validation, data.test, template_file))


def evaluation_files(recipe: Recipe) -> list[Any]:
    """Digests of benchmark files and of the judge's prompt template. Answers depend on the items,
    not on the name of their file.
    """
    judge = recipe.evaluate.judge
    return _local_files(
        [
            *(benchmark.source for benchmark in recipe.evaluate.benchmarks.values()),
            *map(str, local_benchmark_files(recipe.evaluate)),
            judge.prompt_template if judge else None,
        ]
    )


def _local_files(sources: Iterable[str | None]) -> list[Any]:
    """Digests of those sources that are local files."""
    paths = [Path(os.path.expanduser(source)) for source in sources if source]
    return [content_digest(path) for path in paths if os.path.isfile(path)]


def model_files(sources: Iterable[ModelSource]) -> list[Any]:
    """Names and digests of the files of local models. Models of the Hub have their commit, models
    of a package its version.
    """
    digests: list[Any] = []
    for source in sources:
        path = Path(os.path.expanduser(source.model))
        files = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            files = sorted(
                {file for pattern in MODEL_FILES for file in path.glob(pattern)} - {path / MANIFEST}
            )
        digests.append([[file.name, *content_digest(file)] for file in files])
    return digests


def plugin_files(recipe: Recipe) -> list[Any]:
    """Names and digests of the recipe's plugin modules, which reading the recipe has imported."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in recipe.plugins]
    return [[name, *_local_files([file])] for name, file in zip(recipe.plugins, files, strict=True)]


def changed_file(recipe: Recipe) -> str:
    """What differs between two recipes with equal fields: a missing source, or a file's content."""
    data, template = recipe.data, recipe.prompt.template
    files = [
        source
        for source in (data.source, data.validation, data.test, template)
        if source and Path(source).suffix in DATA_SUFFIXES
    ]
    models = [
        source.model
        for source in (recipe.student, recipe.teacher)
        if source and source.model.startswith(("/", ".", "~"))
    ]
    for source in (*files, *models):
        if not os.path.exists(os.path.expanduser(source)):
            return f"{source} no longer exists, put it back"
    return "the content of a data file or of a model folder"
