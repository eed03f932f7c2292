"""Digests of the files and folders that a recipe names. They enter fingerprints, so that a changed
file of the same name is noticed, and are recorded in the run directory, so that the refusal can
name it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from pocl_ds.config import HarnessConfig, ModelSource, Recipe
from pocl_ds.config.data import HELD_OUT_SPLITS
from pocl_ds.data.source_files import local_files
from pocl_ds.errors import ModelError
from pocl_ds.evaluation.benchmarks import KNOWN_BENCHMARKS, TEST_SPLIT, local_benchmark_files
from pocl_ds.models.model_paths import (
    PACKAGE_SCHEME,
    base_of_adapter,
    is_adapter,
    local_path,
)
from pocl_ds.workflow.manifest import MANIFEST

Digests: TypeAlias = dict[str, list[Any]]  # path -> size in bytes and sha256

# Files up to this size are digested completely, larger ones by evenly spaced blocks.
FULL_DIGEST_BYTES, BLOCK_BYTES, BLOCK_COUNT = 256 << 20, 1 << 18, 128

# Files in a model's folder from which transformers builds a tokenizer and its chat template, and
# the file that names the ids that end a response.
TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
# Fields of config.json that choose the class of the tokenizer and the ids that end a response.
TOKENIZER_FIELDS = ("model_type", "tokenizer_class", "eos_token_id")
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.py", *TOKENIZER_FILES)


def content_digest(path: Path, *, files: int = 1) -> list[Any]:
    """Size in bytes and sha256 of a user's file.

    Above 256 MiB the digest covers both ends and evenly spaced blocks between them, so that it
    takes well under a second at any size. Each file is read once per process. files: number of
    files of one source, which share these limits.
    """
    status, limit = path.stat(), FULL_DIGEST_BYTES // files
    blocks = None if status.st_size <= limit else max(2, BLOCK_COUNT // files)
    return [status.st_size, _sampled_digest(str(path), status.st_size, status.st_mtime_ns, blocks)]


@functools.cache
def _sampled_digest(path: str, size: int, _modified_ns: int, blocks: int | None) -> str:
    """sha256 of evenly spaced blocks of a file; of all its bytes if `blocks` is None."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        if blocks is None or size <= blocks * BLOCK_BYTES:
            while block := stream.read(1 << 22):
                digest.update(block)
        else:
            for number in range(blocks):
                stream.seek((size - BLOCK_BYTES) * number // (blocks - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def data_files(recipe: Recipe) -> Digests:
    """Digests of the local data files, in the order of the recipe's sources."""
    data = recipe.data
    held_out = [data.held_out_source(split) for split in HELD_OUT_SPLITS]
    sections = [*data.training_sources, *held_out]
    paths = [path for section in sections if section for path in local_files(section.source)]
    return {str(path): content_digest(path, files=len(paths)) for path in paths}


def template_file(recipe: Recipe) -> Digests:
    """Digest of the file that prompt.template names."""
    template = recipe.prompt.template
    return _file_digests([template] if template.endswith(".jinja") else [])


def benchmark_files(recipe: Recipe) -> Digests:
    """Digests of benchmark files. Answers depend on the items, not on the name of their file."""
    sources = [benchmark.source for benchmark in recipe.evaluate.benchmarks.values()]
    own = [source for source in sources if source not in (TEST_SPLIT, *KNOWN_BENCHMARKS)]
    paths = [path for source in own for path in local_files(source)]
    paths += local_benchmark_files(recipe.evaluate)
    return {str(path): content_digest(path) for path in paths}


def harness_file_digests(harness: HarnessConfig | None) -> list[Any]:
    """Digests of the task files of evaluate.harness.include_path."""
    if harness is None or harness.include_path is None:
        return []
    folder = Path(os.path.expanduser(harness.include_path))
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".py"))
    return [content_digest(path) for path in paths]


def judge_template_file(recipe: Recipe) -> Digests:
    """Digest of the file with the judge's prompt template."""
    judge = recipe.evaluate.judge
    return _file_digests([judge.prompt_template] if judge else [])


def score_file(recipe: Recipe) -> Digests:
    """Digest of the file that ranking.scores names."""
    return _file_digests([recipe.ranking.scores])


def plugin_files(recipe: Recipe) -> Digests:
    """Digests of the recipe's plugin modules, which reading the recipe has imported."""
    return _file_digests(
        [getattr(sys.modules.get(name), "__file__", None) for name in recipe.plugins]
    )


def _file_digests(names: Iterable[str | None]) -> Digests:
    """Digests of those names that are local files."""
    paths = [Path(os.path.expanduser(name)) for name in names if name]
    return {str(path): content_digest(path) for path in paths if os.path.isfile(path)}


def tokenizer_files(source: ModelSource) -> Digests:
    """Digests of the files of a local model that define its tokenizer, its chat template and the
    ids that end a response; none for a model of the Hub, whose commit is recorded.

    The weights are not among them. A .gguf file holds everything.
    """
    path = _local_path(source)
    digests = _folder_digests(path, TOKENIZER_FILES)
    if os.path.isfile(path / "config.json"):
        digests[str(path / "config.json")] = _tokenizer_fields(path / "config.json")
    return {**digests, **_base_digests(source, tokenizer_files)} or _single_file_digests(source)


def model_files(source: ModelSource) -> Digests:
    """Digests of all files of a local model; none for one of the Hub, whose commit is recorded."""
    path = _local_path(source)
    digests = _folder_digests(path, MODEL_FILES)
    digests.pop(str(path / MANIFEST), None)
    return {**digests, **_base_digests(source, model_files)} or _single_file_digests(source)


def _local_path(source: ModelSource) -> Path:
    try:
        return local_path(source.model)
    except ModelError:  # reported where the model is loaded
        return Path(source.model)


def _base_digests(source: ModelSource, digests: Callable[[ModelSource], Digests]) -> Digests:
    """Digests of the base model, if the model is a folder with an adapter."""
    folder = _local_path(source)
    if not is_adapter(folder):
        return {}
    try:
        name, revision = base_of_adapter(folder)
    except ModelError:  # reported where the model is loaded
        return {}
    return digests(source.model_copy(update={"model": name, "revision": revision}))


def _folder_digests(folder: Path, patterns: Iterable[str]) -> Digests:
    if not os.path.isdir(folder):
        return {}
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {str(path): content_digest(path) for path in paths if os.path.isfile(path)}


def _single_file_digests(source: ModelSource) -> Digests:
    """Digest of a model that is one file, or the version of the package that it comes from."""
    if not source.model.startswith(PACKAGE_SCHEME):
        return _file_digests([source.model])
    package = source.model.removeprefix(PACKAGE_SCHEME).partition("/")[0]
    try:
        return {source.model: [metadata.version(package)]}
    except (metadata.PackageNotFoundError, ValueError):
        return {}


def _tokenizer_fields(path: Path) -> list[Any]:
    """The values of TOKENIZER_FIELDS in a config.json; none if it cannot be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [tree.get(name) for name in TOKENIZER_FIELDS] if isinstance(tree, dict) else []


def described_inputs(recipe: Recipe) -> dict[str, Digests]:
    """The digests of all files that a recipe names, by what the files are, in words."""
    teacher = recipe.local_teacher
    models: dict[str, ModelSource] = {"student": recipe.student}
    if teacher:
        models |= teacher.named_sources
    inputs = {
        "the data": data_files(recipe),
        "the template file": template_file(recipe),
        "a benchmark": benchmark_files(recipe),
        "the judge's prompt template": judge_template_file(recipe),
        "a plugin": plugin_files(recipe),
    }
    for name, source in models.items():
        tokenizer = tokenizer_files(source)
        inputs[f"the tokenizer or chat template of the {name}"] = tokenizer
        inputs[f"the weights or configuration of the {name}"] = {
            path: digest
            for path, digest in model_files(source).items()
            if tokenizer.get(path) != digest
        }
    return inputs


def changed_inputs(recorded: Any, recipe: Recipe, *, same_fields: bool) -> list[str]:
    """What differs between the digests of today and those of another day, in words with the files'
    names.

    recorded: result of `described_inputs`, read from JSON; anything else counts as nothing.
    same_fields: the recipe's fields are the recorded ones, so files may not come or go either.
    """
    if not isinstance(recorded, dict):
        return []
    changes = []
    for description, digests in described_inputs(recipe).items():
        before = recorded.get(description)
        if not isinstance(before, dict):
            continue
        different = [path for path in before if path in digests and digests[path] != before[path]]
        if same_fields:
            missing = [path for path in before if path not in digests]
            changes += [f"{path} no longer exists, put it back" for path in missing[:1]]
            different += [path for path in digests if path not in before]
        if different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            changes.append(f"{description} ({different[0]}{more})")
    return changes
