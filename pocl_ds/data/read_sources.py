"""From the data sources of a recipe to samples with their splits.

Rendering the prompts, which decide the splits, is shared by several processes.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from pocl_ds.config.data import (
    DOCUMENTATION,
    HELD_OUT_SPLITS,
    STORIES,
    TASKS,
    DataConfig,
    SourceConfig,
)
from pocl_ds.data.conversation import Sample
from pocl_ds.data.documentation import extract_documentation_samples
from pocl_ds.data.mixture import mixture_rows
from pocl_ds.data.records import RecordCounts, samples_from_records
from pocl_ds.data.sample_ids import SampleIds
from pocl_ds.data.sample_spool import SPLITS, SampleSpool
from pocl_ds.data.sources import read_source_records
from pocl_ds.data.splits import assign_split, split_key
from pocl_ds.data.stories import generate_stories
from pocl_ds.data.tasks import generate_tasks
from pocl_ds.data.tokenize_workers import chunks_of_lines, map_chunks
from pocl_ds.errors import DataError
from pocl_ds.runtime.progress import Progress

log = logging.getLogger("pocl_ds")

RenderPrompt: TypeAlias = Callable[[Sample], str]
MAX_DOMAINS = 1000  # more are texts that were named by mistake
MIN_PROGRESS_SECONDS = 2.0  # faster work shows no progress


@dataclass
class InvalidSamples:
    """Counts, by reason, records and samples that cannot be used, or refuses them.

    mode: data.on_invalid.
    """

    mode: str
    reasons: Counter[str] = field(default_factory=Counter)
    first_error: str = ""

    def __call__(self, error: DataError) -> None:
        """Count one record, or raise DataError with data.on_invalid=error."""
        if self.mode == "error":
            remedy = "; data.on_invalid=skip leaves out every such record"
            message = str(error)
            if "data.on_invalid" not in message:
                message += remedy
            raise DataError(message, reason=error.reason) from None
        self.first_error = self.first_error or str(error)
        self.reasons[error.reason] += 1

    def log(self) -> None:
        """Warn of the skipped records."""
        if self.reasons:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
            log.warning(
                "skipped %s records that cannot be used (%s); the first: %s",
                f"{self.reasons.total():,}",
                reasons,
                self.first_error,
            )


def template_error(error: DataError) -> DataError:
    """The error of a template for one sample, with a reason to count it by."""
    reason = "refused by the template" if error.reason == "other" else error.reason
    return DataError(str(error), reason=reason)


@dataclass(frozen=True)
class SampleHashes:
    """Of the samples of a chunk."""

    hashes: list[tuple[int, int, int]]  # as `SampleSpool.add` takes them; zeros for an error
    domains: list[str]
    errors: dict[int, DataError]  # place in the chunk -> why the sample cannot be used


def hash_samples(lines: Sequence[str], render_prompt: RenderPrompt) -> SampleHashes:
    """Split key, selection key and hash of the id of each sample, and its domain."""
    hashes = SampleHashes([], [], {})
    for number, line in enumerate(lines):
        sample = Sample.from_json(line)
        hashes.domains.append(sample.domain)
        try:
            key = split_key(sample, render_prompt)
        except DataError as error:
            hashes.errors[number] = template_error(error)
            hashes.hashes.append((0, 0, 0))
            continue
        tie = hashlib.sha256(sample.id.encode()).digest()
        split, selection, order = (int.from_bytes(part[:8], "big") for part in (key, key[8:], tie))
        hashes.hashes.append((split, selection, order))
    return hashes


class SourceReader:
    """Reads every source of a recipe into a `SampleSpool`.

    A prompt of a test or validation file is omitted from the other splits. `counts` has what the
    records of each source hold, `domains` the number of each domain.
    """

    def __init__(
        self,
        data: DataConfig,
        render_prompt: RenderPrompt,
        spool: SampleSpool,
        invalid: InvalidSamples,
        num_workers: int,
    ) -> None:
        self.data, self.render_prompt, self.spool = data, render_prompt, spool
        self.invalid, self.num_workers = invalid, num_workers
        self.counts: dict[str, RecordCounts] = {}
        self.omitted = dict.fromkeys(SPLITS, 0)
        self.domains: dict[str, int] = {}
        self._reserved: set[tuple[int, int]] = set()
        held_out = {split: data.held_out_source(split) for split in HELD_OUT_SPLITS}
        self._held_out = held_out
        self._fractions = {
            f"{split}_fraction": 0.0 if held_out[split] else getattr(data, f"{split}_fraction")
            for split in HELD_OUT_SPLITS
        }

    def read(self) -> None:
        """Read all sources. Raises DataError for a source that cannot be used."""
        # Files for test and validation come first, so that their prompts are known.
        for split in reversed(HELD_OUT_SPLITS):
            if source := self._held_out[split]:
                name = f"data.{split}" if getattr(self.data, split) else f"data.hub_{split}_split"
                ids = SampleIds(self.data.duplicate_ids, "data.fields.id")
                self._read(source, name, ids, split=split)
        # One table of ids, so that the samples of a mixture have different ones.
        ids = SampleIds(self.data.duplicate_ids, "data.fields.id")
        for number, source in enumerate(self.data.training_sources):
            start = len(self.spool)
            setting = f"data.sources[{number}]" if self.data.sources else "data"
            self._read(source, setting, ids, number=number)
            self._apply_weight(source, start)
        self._warn_of_omitted()

    def _read(
        self,
        source: SourceConfig,
        setting: str,
        ids: SampleIds,
        *,
        split: str | None = None,
        number: int = 0,
    ) -> None:
        """Read one source. split: of all its samples; None for that of their prompts."""
        counts = self.counts[setting if split else source.label] = RecordCounts()
        samples = self._samples(source, setting, ids, counts)
        if len(self.data.training_sources) > 1 and split is None:
            samples = (replace(sample, source=source.label) for sample in samples)
        if self.data.has_domains:
            samples = (replace(s, domain=s.domain or source.label) for s in samples)
        render_prompt, reserved = self.render_prompt, set[tuple[int, int]]()
        with Progress(
            None, "samples", f"read {source.label}", min_seconds=MIN_PROGRESS_SECONDS
        ) as progress:
            for lines, result in map_chunks(
                lambda chunk: hash_samples(chunk, render_prompt),
                chunks_of_lines(sample.to_json() for sample in samples),
                self.num_workers,
            ):
                for place, (line, hashes) in enumerate(zip(lines, result.hashes)):
                    if error := result.errors.get(place):
                        counts.invalid[error.reason] = counts.invalid.get(error.reason, 0) + 1
                        self.invalid(error)
                        continue
                    own_split = split or assign_split(hashes[0], **self._fractions)
                    if hashes[:2] in self._reserved:
                        self.omitted[own_split] += 1
                        continue
                    domain = self._domain_number(result.domains[place])
                    self.spool.add(line, own_split, number, hashes, domain)
                    if split:
                        reserved.add(hashes[:2])
                progress.advance(len(lines))
        self._reserved |= reserved

    def _domain_number(self, domain: str) -> int:
        number = self.domains.setdefault(domain, len(self.domains))
        if number >= MAX_DOMAINS:
            raise DataError(
                f"the samples have more than {MAX_DOMAINS} domains, the last one {domain!r}: let "
                "data.fields.domain name a field with few values"
            )
        return number

    def _samples(
        self, source: SourceConfig, setting: str, ids: SampleIds, counts: RecordCounts
    ) -> Iterator[Sample]:
        data = self.data
        if source.source == DOCUMENTATION:
            return extract_documentation_samples(data.documentation)
        if source.source == STORIES:
            return generate_stories()
        if source.source == TASKS:
            return generate_tasks(data.tasks.count, families=data.tasks.families)
        return samples_from_records(
            read_source_records(
                source,
                streaming=data.streaming,
                needs_split=any(
                    source is self._held_out[split] and getattr(data, f"hub_{split}_split")
                    for split in HELD_OUT_SPLITS
                ),
                setting=setting,
            ),
            source.source if isinstance(source.source, str) else source.label,
            source.format,
            {str(field): name for field, name in source.fields.items()},
            setting="data.fields" if setting == "data" else f"{setting}.fields",
            roles=data.roles,
            train_on=data.train_on,
            ids=ids,
            on_invalid=self.invalid,
            counts=counts,
        )

    def _apply_weight(self, source: SourceConfig, start: int) -> None:
        """Leave out the samples from row `start` on that the source's weight or limit excludes."""
        samples = len(self.spool) - start
        if source.weight == 1 and (source.max_samples is None or source.max_samples >= samples):
            return
        chosen = mixture_rows(self.spool.ids(start), source.weight, source.max_samples)
        excluded = np.setdiff1d(np.arange(samples), chosen, assume_unique=True)
        self.spool.leave_out(start + excluded)
        log.info("%s: %s of %s samples", source.label, f"{len(chosen):,}", f"{samples:,}")

    def _warn_of_omitted(self) -> None:
        for split, owner in (
            ("train", "a validation or test"),
            ("validation", "a test"),
            ("test", "a validation"),
        ):
            if count := self.omitted[split]:
                name = "training" if split == "train" else split
                log.warning(
                    "%d %s samples have the prompt of %s sample: left out of %s",
                    count,
                    name,
                    owner,
                    name,
                )


def mixture_names(data: DataConfig) -> list[str]:
    """Names of the sources of a mixture, in the order of their numbers; empty for one source."""
    return [source.label for source in data.sources] if len(data.sources) > 1 else []
