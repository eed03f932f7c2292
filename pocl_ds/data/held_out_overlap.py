"""What training shares with held-out data: near-duplicates, and references that are responses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.conversation import Sample
from pocl_ds.data.near_duplicates import HitCollector, OverlapTable, hash_runs, sample_texts
from pocl_ds.data.records import MIN_WORDS_OF_LONG_TEXT, long_text_key
from pocl_ds.data.sample_spool import SampleSpool
from pocl_ds.data.split_writer import SAMPLES_PER_CHUNK, in_chunks
from pocl_ds.data.tokenize_workers import chunks_of_lines, map_chunks
from pocl_ds.runtime.progress import Progress

log = logging.getLogger("pocl_ds")

# A run of words that more samples have is part of a template. Training has several copies of one
# item where a source asks it in several wordings.
MAX_HELD_OUT_OWNERS, MAX_TRAINING_ROWS = 10, 50
MAX_RUNS = 1 << 24  # of held-out samples, beyond which a part is compared, chosen by hash
MIN_PROGRESS_SECONDS = 2.0


@dataclass
class HeldOutItems:
    """The held-out samples of one split or benchmark, numbered from `start`."""

    name: str
    start: int
    samples: int
    with_long_reference: int = 0
    near_duplicates: NDArray[np.int64] | None = None  # places among the samples
    references_in_training: int = 0


@dataclass(frozen=True)
class Overlap:
    """What training shares with held-out data."""

    items: dict[str, HeldOutItems]
    training_rows: NDArray[np.int64]  # with a near-duplicate, places among the training samples

    def near_duplicates(self) -> dict[str, int]:
        """Number of samples with a near-duplicate on the other side, by name."""
        held_out = {
            name: len(items.near_duplicates)
            for name, items in self.items.items()
            if items.near_duplicates is not None
        }
        return {"train": len(self.training_rows), **held_out} if held_out else {}

    def references_in_training(self) -> dict[str, dict[str, int]]:
        """For each split: samples with a long reference, and how many of these have one that is
        also a training response.
        """
        return {
            name: {
                "with_long_reference": items.with_long_reference,
                "in_training": items.references_in_training,
            }
            for name, items in self.items.items()
        }


class _TableBuilder:
    """Collects hashes with owners, a part of them where they are too many."""

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.uint64]] = []
        self._owners: list[NDArray[np.int64]] = []
        self._runs, self._bits = 0, 0

    def add(self, hashes: NDArray[np.uint64], owners: NDArray[np.int64]) -> None:
        self._append(hashes, owners)
        while self._runs > MAX_RUNS:
            self._bits += 1
            pairs = list(zip(self._hashes, self._owners, strict=True))
            self._hashes, self._owners, self._runs = [], [], 0
            for pair in pairs:
                self._append(*pair)

    def _append(self, hashes: NDArray[np.uint64], owners: NDArray[np.int64]) -> None:
        chosen = (hashes & np.uint64((1 << self._bits) - 1)) == 0
        self._hashes.append(hashes[chosen])
        self._owners.append(owners[chosen])
        self._runs += int(chosen.sum())

    def build(self, max_owners: int | None = None) -> OverlapTable:
        if self._bits:
            log.info(
                "near-duplicates: one in %d runs of words is compared, to bound the memory",
                1 << self._bits,
            )
        return OverlapTable(
            np.concatenate([np.empty(0, np.uint64), *self._hashes]),
            np.concatenate([np.empty(0, np.int64), *self._owners]),
            max_owners=max_owners,
        )


def find_overlap(
    spool: SampleSpool,
    rows: Mapping[str, NDArray[np.int64]],
    benchmarks: Mapping[str, Sequence[Sample]],
    *,
    near_duplicates: bool,
    num_workers: int,
) -> Overlap:
    """Compare the training samples with the held-out ones.

    rows: of each split in the spool. benchmarks: samples by name. near_duplicates: compare runs of
    words too, which takes longer than comparing references.
    """
    # Hash what is held out.
    runs, references, items = _TableBuilder(), _TableBuilder(), dict[str, HeldOutItems]()
    start = 0
    for name, samples in (
        *(
            (split, map(Sample.from_json, spool.lines(rows[split])))
            for split in ("validation", "test")
        ),
        *benchmarks.items(),
    ):
        items[name] = _add_items(name, start, samples, runs, references, near_duplicates)
        start += items[name].samples
    run_table = runs.build(MAX_HELD_OUT_OWNERS)
    reference_table = references.build()

    # Look for it in training.
    run_hits = HitCollector(len(run_table.keys), MAX_TRAINING_ROWS)
    reference_hits = np.zeros(len(reference_table.keys), bool)
    if len(run_table.keys) or len(reference_table.keys):
        label = "compare with held-out data"
        with Progress(
            len(rows["train"]), "samples", label, min_seconds=MIN_PROGRESS_SECONDS
        ) as progress:
            for lines, (places, keys, owner_indices) in map_chunks(
                lambda lines: _find_in_lines(lines, run_table, reference_table),
                chunks_of_lines(spool.lines(rows["train"])),
                num_workers,
            ):
                run_hits.add(places + progress.done, keys)
                reference_hits[owner_indices] = True
                progress.advance(len(lines))

    # Whose hashes were found?
    training_rows, shared = run_hits.result()
    run_owners, reference_owners = (
        run_table.owners_of(shared),
        reference_table.owners_of(reference_hits),
    )
    for group in items.values():
        if near_duplicates:
            group.near_duplicates = _owned(run_owners, group)
        group.references_in_training = len(_owned(reference_owners, group))
    return Overlap(items, training_rows)


def _add_items(
    name: str,
    start: int,
    samples: Iterable[Sample],
    runs: _TableBuilder,
    references: _TableBuilder,
    near_duplicates: bool,
) -> HeldOutItems:
    """Add the hashes of held-out samples to both tables."""
    items = HeldOutItems(name, start, 0)
    for chunk in in_chunks(samples, SAMPLES_PER_CHUNK):
        numbered = list(enumerate(chunk, start + items.samples))
        items.samples += len(chunk)
        if near_duplicates:
            runs.add(
                *hash_runs((n, text) for n, sample in numbered for text in sample_texts(sample))
            )
        keys = [
            (n, key)
            for n, sample in numbered
            for text in sample.references
            if (key := long_text_key(text)) is not None
        ]
        owners = np.array([n for n, _ in keys], np.int64)
        references.add(np.array([key for _, key in keys], np.uint64), owners)
        items.with_long_reference += len(np.unique(owners))
    return items


def _owned(owners: NDArray[np.int64], items: HeldOutItems) -> NDArray[np.int64]:
    inside = (owners >= items.start) & (owners < items.start + items.samples)
    return owners[inside] - items.start


def _find_in_lines(
    lines: Sequence[str], runs: OverlapTable, references: OverlapTable
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of a sample's number and a key of `runs` that it has, and the keys of `references`
    that are training responses.
    """
    samples = list(map(Sample.from_json, lines))
    places, keys = np.empty(0, np.int64), np.empty(0, np.int64)
    if len(runs.keys):
        hashes, owners = hash_runs(
            (number, text) for number, sample in enumerate(samples) for text in sample_texts(sample)
        )
        owner_indices, keys = runs.find(hashes)
        places = owners[owner_indices]
    responses = [long_text_key(sample.response.content) for sample in samples]
    response_keys = np.array([key for key in responses if key is not None], np.uint64)
    return places, keys, references.find(response_keys)[1]


def log_overlap(overlap: Overlap, rows: Mapping[str, NDArray[np.int64]], mode: str) -> None:
    """Warn of what training shares with held-out data. mode: data.decontaminate."""
    for name, items in overlap.items.items():
        label = name if name in rows else f"benchmark {name}"
        if items.references_in_training and name in rows:
            log.warning(
                "%s: %d of %d samples (%.1f%%) have a reference of %d words or more that is also a "
                "training response, ignoring case and white space (%d have a reference that long): "
                "their scores may reflect memorization",
                label,
                items.references_in_training,
                items.samples,
                100 * items.references_in_training / items.samples,
                MIN_WORDS_OF_LONG_TEXT,
                items.with_long_reference,
            )
        count = 0 if items.near_duplicates is None else len(items.near_duplicates)
        if count:
            remedy = {
                "count": "data.decontaminate=train leaves these training samples out",
                "train": "those training samples are left out",
                "test": "they are left out" if name in rows else "they stay in the benchmark",
            }[mode]
            log.warning(
                "%s: %d of %d samples (%.1f%%) share 13 words in a row with one of training: %s",
                label,
                count,
                items.samples,
                100 * count / items.samples,
                remedy,
            )
