"""The step `preprocess`: from the data source to three tokenized splits.

The hash of a sample's *prompt* decides its split, and whether a limited selection includes it. So
neither depends on the order of a file, and samples with the same prompt are never in two splits.
Paraphrases of one prompt may be; the step counts the references of the other splits that training
responses repeat.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.data.documentation import extract_documentation_samples
from pocl_ds.data.key_table import KeyTable
from pocl_ds.data.records import MIN_WORDS_OF_LONG_TEXT, long_text_key
from pocl_ds.data.sources import read_samples
from pocl_ds.data.tokenized import SampleTokenizer, TokenizationCounts, write_tokenized_split
from pocl_ds.errors import DataError
from pocl_ds.runtime.hashing import rows_of_smallest
from pocl_ds.workflow.files import atomic_directory
from pocl_ds.workflow.manifest import Manifest, damaged_files, read_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

HELD_OUT = ("validation", "test")
SPLITS = ("train", *HELD_OUT)
TEACHER_DIRECTORY = "teacher"  # in data/: the splits in the tokens of another tokenizer


@dataclass
class InvalidRecords:
    """Counts records without usable content, which data.on_invalid skips or refuses."""

    mode: str
    count: int = 0
    first_error: str = ""

    def __call__(self, error: DataError) -> None:
        """Count one record, or raise DataError with data.on_invalid=error."""
        if self.mode == "error":
            raise DataError(f"{error}; data.on_invalid=skip leaves out every such record") from None
        self.first_error = self.first_error or str(error)
        self.count += 1


def preprocess(
    run: RunDirectory,
    data: DataConfig,
    prompt: PromptConfig,
    tokenizer: Any,
    fingerprint: str,
    teacher_tokenizer: Any = None,
    commits: Mapping[str, str] | None = None,
) -> Manifest:
    """Read, split and tokenize the data into data/, which appears complete or not at all.

    teacher_tokenizer: also write the training and validation splits in its tokens, row by row, to
    data/teacher. commits: commit of each model on the Hub, which the manifest records for later
    steps. Raises DataError if no training samples remain.
    """
    manifest = read_manifest(run.data)
    if (
        manifest
        and manifest.fingerprint == fingerprint
        and not damaged_files(run.data, manifest, checksums=False)
    ):
        return manifest
    start = time.monotonic()
    with atomic_directory(run.data) as folder:
        # Assign every sample of the source to a split.
        invalid = InvalidRecords(data.on_invalid)
        sample_files = _split_samples(data, folder, invalid)
        if invalid.count:
            log.warning(
                "skipped %d records without usable content; the first: %s",
                invalid.count,
                invalid.first_error,
            )

        # Limit and tokenize the splits.
        counts = _tokenize_splits(sample_files, data, SampleTokenizer(tokenizer, prompt), folder)
        if teacher_tokenizer is not None:
            teacher_prompt = prompt.model_copy(update={"overlong": "truncate"})
            _tokenize_for_teacher(folder, SampleTokenizer(teacher_tokenizer, teacher_prompt))

        info = {
            "source": data.source,
            "splits": {split: asdict(count) for split, count in counts.items()},
            "tokenizer": tokenizer.name_or_path,
            "pad_id": tokenizer.pad_token_id,
            "eos_id": tokenizer.eos_token_id,
            "vocabulary": len(tokenizer),
            "invalid_records": invalid.count,
            "commits": dict(commits or {}),
            "references_in_training": _count_references_in_training(folder),
            "seconds": time.monotonic() - start,
        }
        return write_manifest(folder, "preprocess", fingerprint, info=info)


def _tokenize_splits(
    sample_files: dict[str, Path], data: DataConfig, tokenizer: SampleTokenizer, folder: Path
) -> dict[str, TokenizationCounts]:
    """Tokenize the samples of each split, at most data.max_*_samples, and remove their files."""
    counts = {}
    for split in SPLITS:
        limit = getattr(data, f"max_{split}_samples")
        counts[split] = write_tokenized_split(
            _select_samples(sample_files[split], limit), tokenizer, folder, split
        )
        sample_files[split].unlink()
        log.info(
            "%s: %d samples, %d tokens, %d of them responses; %d truncated, %d dropped",
            split,
            counts[split].samples,
            counts[split].tokens,
            counts[split].response_tokens,
            counts[split].truncated,
            counts[split].dropped,
        )
    if not counts["train"].samples:
        raise DataError(
            f"data.source={data.source} leaves no training samples (data.validation_fraction, "
            "data.test_fraction, prompt.overlong): change these or give more data"
        )
    return counts


def _tokenize_for_teacher(folder: Path, tokenizer: SampleTokenizer) -> None:
    """Write the same samples in the tokens of a teacher with another tokenizer."""
    directory = folder / TEACHER_DIRECTORY
    directory.mkdir()
    for split in ("train", "validation"):
        samples = read_sample_file(folder / f"{split}.jsonl")
        write_tokenized_split(samples, tokenizer, directory, split, texts=False)


def _split_samples(data: DataConfig, folder: Path, invalid: InvalidRecords) -> dict[str, Path]:
    """Write the samples of each split to one file, in the order of the source.

    A prompt in a test or validation file of the recipe is omitted from the other splits.
    """
    sample_files = {split: folder / f".{split}.samples" for split in SPLITS}
    streams = {split: path.open("w", encoding="utf-8") for split, path in sample_files.items()}
    reserved_prompts: set[str] = set()
    omitted = dict.fromkeys(SPLITS, 0)
    # Files for test and validation come first, so that their prompts are known.
    sources = (("test", data.test), ("validation", data.validation), (None, data.source))
    try:
        for reserved_split, source in sources:
            prompts: set[str] = set()
            for sample in _read_source(source, data, invalid) if source else ():
                split = reserved_split or _assign_split(sample, data)
                if sample.prompt_key in reserved_prompts:
                    omitted[split] += 1
                    continue
                streams[split].write(sample.to_json() + "\n")
                if reserved_split:
                    prompts.add(sample.prompt_key)
            reserved_prompts |= prompts
    finally:
        for stream in streams.values():
            stream.close()

    # Warn about omitted samples.
    for split, prompt_source in (
        ("train", "a validation or test"),
        ("validation", "a test"),
        ("test", "a validation"),
    ):
        if omitted[split]:
            log.warning(
                "%d %s samples have the prompt of %s sample: left out of %s",
                omitted[split],
                "training" if split == "train" else split,
                prompt_source,
                "training" if split == "train" else split,
            )
    return sample_files


def _count_references_in_training(folder: Path) -> dict[str, dict[str, int]]:
    """For validation and test: samples with a long reference, and how many of these have one that
    is also a training response.

    Such samples occur where a source asks one question in several wordings. Memory grows with the
    references of these two splits, not with training.
    """
    # The number of a key is 1, or 2 if a training response has the same key.
    held_out = KeyTable()
    for split in HELD_OUT:
        for sample in read_sample_file(folder / f"{split}.jsonl"):
            for key in _long_text_keys(sample.references):
                held_out.put(key, 1)
    for sample in read_sample_file(folder / "train.jsonl") if len(held_out) else ():
        for key in _long_text_keys(sample.references[:1]):  # the training response
            if held_out.get(key):
                held_out.put(key, 2)

    counts = {}
    for split in HELD_OUT:
        samples = with_long_reference = in_training = 0
        for sample in read_sample_file(folder / f"{split}.jsonl"):
            keys = _long_text_keys(sample.references)
            samples += 1
            with_long_reference += bool(keys)
            in_training += any(held_out.get(key) == 2 for key in keys)
        counts[split] = {"with_long_reference": with_long_reference, "in_training": in_training}
        if in_training:
            log.warning(
                "%s: %d of %d samples (%.1f%%) have a reference of %d words or more that is also a "
                "training response, ignoring case and white space (%d have a reference that long): "
                "their scores may reflect memorization",
                split,
                in_training,
                samples,
                100 * in_training / samples,
                MIN_WORDS_OF_LONG_TEXT,
                with_long_reference,
            )
    return counts


def _long_text_keys(texts: Iterable[str]) -> list[int]:
    return [key for text in texts if (key := long_text_key(text)) is not None]


def _read_source(source: str, data: DataConfig, invalid: InvalidRecords) -> Iterator[Sample]:
    if source == "documentation":
        return extract_documentation_samples(data.documentation)
    return read_samples(
        source,
        format=data.format,
        fields={str(field): name for field, name in data.fields.items()},
        hub_subset=data.hub_subset,
        hub_split=data.hub_split,
        hub_revision=data.hub_revision,
        on_invalid=invalid,
    )


def _assign_split(sample: Sample, data: DataConfig) -> str:
    """The split of a sample, from the hash of its prompt.

    A split for which the recipe names a file gets nothing from the source.
    """
    position = int(sample.prompt_key[:13], 16) / 16**13
    test = 0.0 if data.test else data.test_fraction
    validation = 0.0 if data.validation else data.validation_fraction
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"


def _select_samples(path: Path, limit: int | None) -> Iterator[Sample]:
    """At most `limit` samples of a file, those with the smallest hashes, in the file's order.

    Reads the file twice, so that the samples are never all in memory.
    """
    if limit is None:
        yield from read_sample_file(path)
        return
    # The first half of the hash decided the split, so the selection uses the second half.
    keys = ((sample.prompt_key[16:], sample.id) for sample in read_sample_file(path))
    selected = set(rows_of_smallest(keys, limit))
    for row, sample in enumerate(read_sample_file(path)):
        if row in selected:
            yield sample
