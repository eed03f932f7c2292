"""Where the known benchmarks lie; and which items are asked: the same whichever model answers,
however a file is ordered.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pocl_ds.config import BenchmarkConfig, EvaluateConfig
from pocl_ds.data.records import Sample, read_sample_file
from pocl_ds.data.sources import read_samples
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, DataError, RecipeError
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

HELD_OUT = "test"


@dataclass(frozen=True)
class Known:
    """A benchmark of METHOD 5. files: what it is called in a folder, as here, as MiniLLM (arXiv
    2306.08543) has it.
    """

    repository: str  # data set on the Hub; its file is the last of `files` without its first folder
    files: tuple[str, ...]
    items: int

    @property
    def hub_file(self) -> str:
        """Its file in the repository."""
        return self.files[-1].partition("/")[2]


KNOWN = {
    "dolly": Known(
        "MiniLLM/dolly", ("dolly.jsonl", "eval_dolly500.jsonl", "dolly/valid.jsonl"), 500
    ),
    "self_inst": Known(
        "MiniLLM/self-inst",
        ("self_inst.jsonl", "eval_selfinst242.jsonl", "self-inst/valid.jsonl"),
        242,
    ),
    "vicuna": Known(
        "MiniLLM/Vicuna", ("vicuna.jsonl", "eval_vicuna80.jsonl", "vicuna/valid.jsonl"), 80
    ),
    # References of 11 tokens and more, in both.
    "sni": Known(
        "MiniLLM/sinst", ("sni.jsonl", "eval_sni_11plus.jsonl", "sinst/11_/valid.jsonl"), 1694
    ),
    "unni": Known(
        "MiniLLM/uinst", ("unni.jsonl", "eval_unni_11plus.jsonl", "uinst/11_/valid.jsonl"), 10_000
    ),
}


def check_names(benchmarks: Iterable[str]) -> None:
    """Names become file names. Raises RecipeError for one that cannot."""
    for name in benchmarks:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise RecipeError(
                f"evaluate.benchmarks name {name!r} cannot be a file name: use letters, digits, "
                f"`.`, `_`, `-`"
            )


def questions(run: RunDirectory, config: EvaluateConfig, name: str) -> list[Sample]:
    """A benchmark's samples: at most evaluate.max_samples, chosen by the hash of their ids.

    Raises DataError where an item has no reference or the data cannot be had, ArtifactError where
    there is nothing.
    """
    benchmark = config.benchmarks[name]
    samples = _samples(run, benchmark, config.benchmark_dir, name)
    if not samples:
        raise ArtifactError(
            f"benchmark {benchmark.source!r} holds no samples: give data.test_fraction or "
            f"evaluate.benchmarks"
        )
    return [
        samples[position]
        for position in chosen([sample.id for sample in samples], config.max_samples)
    ]


def chosen(ids: Sequence[str], limit: int | None) -> list[int]:
    """Positions of at most `limit` ids, those whose sha256 comes first, in the order of the file.

    The choice depends on ids alone, so every model and seed answers the same questions.
    """
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    by_hash = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    return sorted(by_hash[:limit])


def split_ids(split: TokenizedSplit) -> list[str]:
    """The ids of a split as text."""
    return [bytes(value).decode() for value in split.ids]


def seen_in_training(run: RunDirectory, asked: Mapping[str, Sequence[Sample]]) -> dict[str, int]:
    """Items by benchmark that ask what a training sample asks: their scores tell of memory too.
    Reads data/train.jsonl once.
    """
    keys = {name: [sample.prompt_key for sample in samples] for name, samples in asked.items()}
    every, seen = {key for of_one in keys.values() for key in of_one}, set[str]()
    if every:
        training = (sample.prompt_key for sample in read_sample_file(run.data / "train.jsonl"))
        seen = {key for key in training if key in every}
    found = {name: sum(key in seen for key in of_one) for name, of_one in keys.items()}
    for name, count in found.items():
        if count:
            log.warning(
                "benchmark %s: %d of %d items ask what a training sample asks: its numbers tell "
                "of memory too",
                name,
                count,
                len(keys[name]),
            )
    return found


def known_file(known: Known, folder: str | None, name: str, revision: str | None = None) -> Path:
    """The file of a known benchmark: in the folder where one is named, else from the Hub. Raises
    DataError.
    """
    if folder is None:
        return _downloaded(known, name, revision)
    for file in known.files:
        path = Path(os.path.expanduser(folder)) / file
        if path.is_file():
            return path
    raise DataError(
        f"benchmark {name!r} is not in evaluate.benchmark_dir {folder} (looked for "
        f"{', '.join(known.files)}): put it there, "
        f"or name its file, as in evaluate.benchmarks.{name}=my.jsonl"
    )


def local_files(config: EvaluateConfig) -> list[Path]:
    """The files in evaluate.benchmark_dir that known benchmarks are read from, as far as they
    are there.
    """
    found = []
    for benchmark in config.benchmarks.values():
        if benchmark.source in KNOWN and config.benchmark_dir is not None:
            with suppress(DataError):
                found.append(
                    known_file(KNOWN[benchmark.source], config.benchmark_dir, benchmark.source)
                )
    return found


def _samples(
    run: RunDirectory, benchmark: BenchmarkConfig, folder: str | None, name: str
) -> list[Sample]:
    if benchmark.source == HELD_OUT:
        return list(read_sample_file(run.data / "test.jsonl"))
    fields = {str(ours): theirs for ours, theirs in benchmark.fields.items()}
    known, setting = KNOWN.get(benchmark.source), f"evaluate.benchmarks.{name}.fields"
    if known is None:
        return list(
            read_samples(
                benchmark.source,
                format=benchmark.format,
                fields=fields,
                setting=setting,
                hub_subset=benchmark.hub_subset,
                hub_split=benchmark.hub_split,
                hub_revision=benchmark.hub_revision,
            )
        )
    path = known_file(known, folder, benchmark.source, benchmark.hub_revision)
    samples = list(
        islice(
            read_samples(str(path), format=benchmark.format, fields=fields, setting=setting),
            known.items + 1,
        )
    )
    longer = (
        len(samples) > known.items and benchmark.source != "unni"
    )  # whose file is longer: the benchmark is its beginning
    if longer or len(samples) < known.items:
        log.warning(
            "benchmark %s: %s holds %s items, the published one %d: do not compare with published "
            "numbers",
            name,
            path,
            "more" if longer else len(samples),
            known.items,
        )
    return samples[: known.items]


def _downloaded(known: Known, name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(
                known.repository, known.hub_file, repo_type="dataset", revision=revision
            )
        )
    except Exception as error:  # network, offline mode, access: a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"benchmark {name!r} ({known.repository}, {known.hub_file}) cannot be had from the "
            f"Hub ({type(error).__name__}: "
            f"{reason}): check the network, or name a folder that has it with "
            f"evaluate.benchmark_dir"
        ) from None
