"""The stage `data`: from the source to three encoded splits.

A sample's split and its place in a limited selection follow from the hash of its *prompt*. So
neither depends on the order of a file, and samples that ask the same, word for word, never lie in
two splits. Those that ask it in other words may: what training has of the references of the others
is counted.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.data.documentation import harvest
from pocl_ds.data.key_set import SeenKeys
from pocl_ds.data.records import LONG, Sample, read_normalised, read_samples, text_key
from pocl_ds.data.tokenized import Encoder, encode_split
from pocl_ds.errors import DataError
from pocl_ds.workflow.run_dir import (
    Manifest,
    RunDirectory,
    atomic_directory,
    damaged_files,
    read_manifest,
    write_manifest,
)

log = logging.getLogger("pocl_ds")

HELD_OUT = ("validation", "test")
SPLITS = ("train", *HELD_OUT)
TEACHER = "teacher"  # folder below the data's


@dataclass
class Unusable:
    """Records that say nothing to learn from, as data.on_invalid has it."""

    mode: str
    count: int = 0
    first: str = ""

    def __call__(self, fault: DataError) -> None:
        """Count one, or raise DataError where such records are an error."""
        if self.mode == "error":
            raise DataError(f"{fault}; data.on_invalid=skip leaves out every such record") from None
        self.first = self.first or str(fault)
        self.count += 1


def prepare_data(
    run: RunDirectory,
    data: DataConfig,
    prompt: PromptConfig,
    tokenizer: Any,
    fingerprint: str,
    teacher_tokenizer: Any = None,
    commits: Mapping[str, str] | None = None,
) -> Manifest:
    """Read, split, encode; data/ appears as a whole or not at all. Raises DataError where nothing
    is left to train on.

    teacher_tokenizer: encode what training reads in its tokens too, row by row, below data/teacher.
    commits: of the Hub's models, for the manifest: later stages take these.
    """
    manifest = read_manifest(run.data)
    if (
        manifest
        and manifest.fingerprint == fingerprint
        and not damaged_files(run.data, manifest, checksums=False)
    ):
        return manifest
    start = time.monotonic()
    encoder = Encoder(tokenizer, prompt)
    with atomic_directory(run.data) as folder:
        unusable = Unusable(data.on_invalid)
        parts = _divide(data, folder, unusable)
        if unusable.count:
            log.warning(
                "%d records say nothing to learn from and are left out; the first: %s",
                unusable.count,
                unusable.first,
            )
        counts = {}
        for split in SPLITS:
            limit = getattr(data, f"max_{split}_samples")
            counts[split] = encode_split(_limited(parts[split], limit), encoder, folder, split)
            parts[split].unlink()
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
        if teacher_tokenizer is not None:
            _encode_again(
                folder,
                Encoder(teacher_tokenizer, prompt.model_copy(update={"overlong": "truncate"})),
            )
        info = {
            "source": data.source,
            "splits": {split: asdict(count) for split, count in counts.items()},
            "tokenizer": tokenizer.name_or_path,
            "pad_id": tokenizer.pad_token_id,
            "eos_id": tokenizer.eos_token_id,
            "vocabulary": len(tokenizer),
            "unusable": unusable.count,
            "commits": dict(commits or {}),
            "known_references": _known_references(folder),
            "seconds": time.monotonic() - start,
        }
        return write_manifest(folder, "preprocess", fingerprint, info=info)


def _encode_again(folder: Path, encoder: Encoder) -> None:
    """The samples that were kept, as a teacher with another tokenizer reads them."""
    (folder / TEACHER).mkdir()
    for split in ("train", "validation"):
        encode_split(
            read_normalised(folder / f"{split}.jsonl"),
            encoder,
            folder / TEACHER,
            split,
            texts=False,
        )


def _divide(data: DataConfig, folder: Path, unusable: Unusable) -> dict[str, Path]:
    """Write each split's samples to a file of its own, in the order of the source. No prompt lies
    in two splits.
    """
    parts = {split: folder / f".{split}.samples" for split in SPLITS}
    streams = {split: path.open("w", encoding="utf-8") for split, path in parts.items()}
    asked: set[str] = set()  # by files that were given for a split
    left_out = dict.fromkeys(SPLITS, 0)
    try:
        for given, source in (
            ("test", data.test),
            ("validation", data.validation),
            (None, data.source),
        ):
            fresh: set[str] = set()
            for sample in _source(source, data, unusable) if source else ():
                split = given or _split_of(sample, data)
                if sample.prompt_key in asked:
                    left_out[split] += 1
                    continue
                streams[split].write(sample.to_json() + "\n")
                if given:
                    fresh.add(sample.prompt_key)
            asked |= fresh
    finally:
        for stream in streams.values():
            stream.close()
    for split, other in (
        ("train", "a validation or test"),
        ("validation", "a test"),
        ("test", "a validation"),
    ):
        if count := left_out[split]:
            name = "training" if split == "train" else split
            log.warning(
                "%d %s samples ask what %s sample asks too: left out of %s",
                count,
                name,
                other,
                name,
            )
    return parts


def _known_references(folder: Path) -> dict[str, dict[str, int]]:
    """Of validation and test: samples with a long reference (`text_key`), and those of them that
    have one which is a response of a training sample too, as where a source asks one question in
    several wordings. Holds a number a reference of these two splits, and nothing of training.
    """
    found, held_out = {}, SeenKeys()  # 1, or 2 for what training has too
    for split in HELD_OUT:
        for sample in read_normalised(folder / f"{split}.jsonl"):
            for key in _keys(sample.references):
                held_out.put(key, 1)
    for sample in read_normalised(folder / "train.jsonl") if len(held_out) else ():
        for key in _keys(sample.references[:1]):  # the one that is trained on
            if held_out.get(key):
                held_out.put(key, 2)
    for split in HELD_OUT:
        samples = long = known = 0
        for sample in read_normalised(folder / f"{split}.jsonl"):
            keys = _keys(sample.references)
            samples += 1
            long += bool(keys)
            known += any(held_out.get(key) == 2 for key in keys)
        found[split] = {"long": long, "known": known}
        if known:
            log.warning(
                "%s: %d of %d samples (%.1f%%) have a reference of %d words or more that is a "
                "response of training too, "
                "whatever its case and white space, of %d that have one so long: their numbers "
                "may tell of memory",
                split,
                known,
                samples,
                100 * known / samples,
                LONG,
                long,
            )
    return found


def _keys(texts: Iterable[str]) -> list[int]:
    """Those of the long ones among some texts."""
    return [key for text in texts if (key := text_key(text)) is not None]


def _source(source: str, data: DataConfig, unusable: Unusable) -> Iterator[Sample]:
    if source == "documentation":
        return harvest(data.documentation)
    fields = {str(ours): theirs for ours, theirs in data.fields.items()}
    return read_samples(
        source,
        format=data.format,
        fields=fields,
        hub_subset=data.hub_subset,
        hub_split=data.hub_split,
        hub_revision=data.hub_revision,
        invalid=unusable,
    )


def _split_of(sample: Sample, data: DataConfig) -> str:
    """test, validation or train, by where the prompt's hash falls; nothing is split off where a
    file was given.
    """
    place = int(sample.prompt_key[:13], 16) / 16**13
    test = 0.0 if data.test else data.test_fraction
    validation = 0.0 if data.validation else data.validation_fraction
    return "test" if place < test else "validation" if place < test + validation else "train"


def _limited(path: Path, limit: int | None) -> Iterator[Sample]:
    """At most `limit` samples of a file, those with the smallest hashes; the order of the file
    stays.
    """
    if limit is None:
        yield from read_normalised(path)
        return
    # Another part of the hash than the one that chose the split, or a limited split would be its
    # lower edge. Read twice: the samples themselves are not held.
    places = (
        (sample.prompt_key[16:], sample.id, number)
        for number, sample in enumerate(read_normalised(path))
    )
    chosen = {number for _, _, number in heapq.nsmallest(limit, places)}
    for number, sample in enumerate(read_normalised(path)):
        if number in chosen:
            yield sample
