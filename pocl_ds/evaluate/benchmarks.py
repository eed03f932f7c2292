"""Benchmarks as questions: prompt ids and references, the same whichever model answers.

`test` is the run's own held-out split, whose prompt ids were fixed by the data stage; any other source is read like
training data and encoded with the run's prompt configuration.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocl_ds.artifacts import RunDirectory, file_digest, read_manifest
from pocl_ds.data.encode import EncodedSplit, Encoder
from pocl_ds.data.samples import read_normalised, read_samples
from pocl_ds.errors import ArtifactError, DataError, RecipeError

HELD_OUT = "test"


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a benchmark. prompt: token ids as every stage sees them; references: at least one text."""

    id: str
    prompt: list[int]
    references: list[str]


def check_names(benchmarks: Iterable[str]) -> None:
    """Names become file names. Raises RecipeError for one that cannot."""
    for name in benchmarks:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise RecipeError(f"evaluate.benchmarks name {name!r} cannot be a file name: use letters, digits, `.`, `_`, `-`")


def chosen(ids: Sequence[str], limit: int | None) -> list[int]:
    """Positions of at most `limit` ids, those whose sha256 comes first, in the order of the file.

    The choice depends on ids alone, so every model and seed answers the same questions.
    """
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    by_hash = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    return sorted(by_hash[:limit])


def source_digest(run: RunDirectory, source: str) -> str:
    """What a benchmark's content is: the data stage's fingerprint, a file's sha256, or a Hub name as given."""
    if source == HELD_OUT:
        manifest = read_manifest(run.data)
        if manifest is None:
            raise ArtifactError(f"{run.data} holds no finished data: run `pocl data` first")
        return manifest.fingerprint
    path = Path(source).expanduser()
    return file_digest(path)["sha256"] if path.is_file() else source


def load_questions(run: RunDirectory, name: str, source: str, encoder: Callable[[], Encoder], limit: int | None) -> list[Question]:
    """The questions of a benchmark. Raises DataError where it is empty or cannot be read."""
    questions = _held_out(run, limit) if source == HELD_OUT else _from_source(source, encoder(), limit)
    if not questions:
        raise DataError(f"evaluate.benchmarks.{name}={source} holds no samples: name another file")
    return questions


def split_ids(split: EncodedSplit) -> list[str]:
    """The ids of a split as text."""
    return [bytes(value).decode() for value in split.ids]


def _held_out(run: RunDirectory, limit: int | None) -> list[Question]:
    split = EncodedSplit.open(run.data, HELD_OUT)
    ids = split_ids(split)
    wanted = set(chosen(ids, limit))
    questions = []
    for row, sample in enumerate(read_normalised(run.data / f"{HELD_OUT}.jsonl")):
        if row not in wanted:
            continue
        if row >= len(ids) or sample.id != ids[row]:
            raise ArtifactError(f"{run.data / 'test.jsonl'} line {row + 1} is sample {sample.id!r}, not the encoded one: "
                                "remove the data folder and run `pocl data` again")
        prompt = np.asarray(split.tokens(row))[: int(split.prompt_tokens[row])]
        questions.append(Question(sample.id, [int(token) for token in prompt], list(sample.references)))
    return questions


def _from_source(source: str, encoder: Encoder, limit: int | None) -> list[Question]:
    samples = list(read_samples(source))
    kept = (samples[position] for position in chosen([sample.id for sample in samples], limit))
    return [Question(sample.id, encoder.prompt(sample), list(sample.references)) for sample in kept]
