"""What lies in the files and folders that a recipe names, as values for fingerprints: another file
of one name is noticed.
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
from pocl_ds.evaluation.benchmarks import local_files
from pocl_ds.workflow.manifest import MANIFEST

WHOLE, BLOCK, BLOCKS = 256 << 20, 1 << 18, 128  # see `content_digest`
FILES = (".jsonl", ".json", ".parquet", ".jinja", ".gguf")
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.py")


def content_digest(path: Path) -> list[Any]:
    """Size and sha256 of a file that a user names; of one above 256 MiB its two ends and evenly
    spaced blocks between them stand for the whole, so that it is known at any size in well under a
    second. Read once a process.
    """
    found = path.stat()
    return [found.st_size, _content(str(path), found.st_size, found.st_mtime_ns)]


@functools.cache
def _content(path: str, size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        if size <= WHOLE:
            while block := stream.read(1 << 22):
                digest.update(block)
        else:
            for number in range(BLOCKS):
                stream.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def data_files(recipe: Recipe) -> list[Any]:
    """Of the data and its template, as `_files`."""
    data, template = recipe.data, recipe.prompt.template
    return _files(
        (data.source, data.validation, data.test, template if template.endswith(".jinja") else None)
    )


def evaluation_files(recipe: Recipe) -> list[Any]:
    """Of benchmarks and the judge, as `_files`. Answers follow from the items themselves, whatever
    file they come from.
    """
    sources, judge = (
        [benchmark.source for benchmark in recipe.evaluate.benchmarks.values()],
        recipe.evaluate.judge,
    )
    return _files(
        [
            *sources,
            *map(str, local_files(recipe.evaluate)),
            judge.prompt_template if judge else None,
        ]
    )


def _files(sources: Iterable[str | None]) -> list[Any]:
    """What lies in the files among some sources: another file of the same name is noticed."""
    paths = [Path(os.path.expanduser(source)) for source in sources if source]
    return [content_digest(path) for path in paths if os.path.isfile(path)]


def model_files(sources: Iterable[ModelSource]) -> list[Any]:
    """What lies in the folders and files among some models; one of the Hub has its commit, one in a
    package its version.
    """
    found: list[Any] = []
    for source in sources:
        path = Path(os.path.expanduser(source.model))
        files = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            files = sorted(
                {file for pattern in MODEL_FILES for file in path.glob(pattern)} - {path / MANIFEST}
            )
        found.append([[file.name, *content_digest(file)] for file in files])
    return found


def plugin_files(recipe: Recipe) -> list[Any]:
    """The recipe's own methods, name and text of each module; reading the recipe has imported them."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in recipe.plugins]
    return [[name, *_files([file])] for name, file in zip(recipe.plugins, files, strict=True)]


def changed_file(recipe: Recipe) -> str:
    """Words for what differs where no field does."""
    data, template = recipe.data, recipe.prompt.template
    files = [
        source
        for source in (data.source, data.validation, data.test, template)
        if source and Path(source).suffix in FILES
    ]
    models = [
        source.model
        for source in (recipe.student, recipe.teacher)
        if source and source.model.startswith(("/", ".", "~"))
    ]
    gone = next(
        (source for source in [*files, *models] if not os.path.exists(os.path.expanduser(source))),
        None,
    )
    return (
        f"{gone} is not there any more, put it back"
        if gone
        else "what lies in a file or a model folder that it names"
    )
