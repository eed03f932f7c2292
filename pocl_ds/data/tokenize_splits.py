"""From spooled samples to tokenized splits, in several processes."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.conversation import Sample
from pocl_ds.data.read_sources import MIN_PROGRESS_SECONDS, InvalidSamples, template_error
from pocl_ds.data.sample_spool import SampleSpool
from pocl_ds.data.sample_tokenizer import EVENTS, SampleTokenizer
from pocl_ds.data.split_writer import (
    SplitWriter,
    TokenizationCounts,
    TokenizedChunk,
    tokenize_chunk,
)
from pocl_ds.data.tokenize_workers import chunks_of_lines, map_chunks
from pocl_ds.errors import DataError
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.files import save_array

log = logging.getLogger("pocl_ds")

TEACHER_DIRECTORY = "teacher"  # in data/: the splits in the tokens of another tokenizer
WARN_SHARE = 0.01  # of samples that are cut or left out
SEEN_IN_TRAINING = "prompt_in_held_out"
# Events that change what is trained, whatever their number.
WARN_EVENTS = ("special_tokens_in_text", "altered_text", "empty_thought", "same_prompt_when_cut")
SPLIT_EVENTS = {
    **EVENTS,
    "invalid": "were left out, because they cannot be used",
    SEEN_IN_TRAINING: "were left out, because their prompt, as tokenized, is one of held-out data",
    "same_prompt_when_cut": "have, after cutting, the same prompt as another sample, from which "
    "the record's prompt differs: raise prompt.max_prompt_tokens",
}


@dataclass(frozen=True)
class TokenizedLines:
    """A chunk of samples as a worker returns it."""

    chunk: TokenizedChunk
    teacher: TokenizedChunk | None  # the same samples in the teacher's tokens
    places: NDArray[np.int64]  # of the samples among the lines: [samples]
    prompt_hashes: NDArray[np.uint64]  # of the prompt's tokens; 0 without a prompt: [samples]
    # Of the complete text of a prompt that was cut; 0 for other samples: [samples]
    cut_prompts: NDArray[np.uint64]
    errors: list[DataError]


@dataclass
class SplitResult:
    """A split that was written."""

    counts: TokenizationCounts = field(default_factory=TokenizationCounts)
    teacher_events: dict[str, int] = field(default_factory=dict)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # of the spool
    prompt_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def info(self) -> dict[str, Any]:
        """The counts, for a manifest."""
        tree = asdict(self.counts)
        return {**tree, "teacher_events": self.teacher_events} if self.teacher_events else tree


@dataclass(frozen=True)
class SplitTokenizer:
    """Writes splits with the tokenizer of the student, and those that `teacher_splits` names also
    with that of the teacher.
    """

    tokenizer: SampleTokenizer
    teacher: SampleTokenizer | None
    invalid: InvalidSamples
    num_workers: int
    teacher_splits: tuple[str, ...] = ("train", "validation")

    def write(
        self,
        spool: SampleSpool,
        rows: NDArray[np.int64],
        folder: Path,
        split: str,
        held_out_prompts: NDArray[np.uint64],
    ) -> SplitResult:
        """Write the samples of these spool rows, but for those whose prompt tokens are held out.

        held_out_prompts: hashes of the prompts of splits that must not share one.
        """
        result, teacher = SplitResult(), self.teacher if split in self.teacher_splits else None
        written: list[NDArray[np.int64]] = []
        prompts: list[NDArray[np.uint64]] = []
        cut_prompts: list[NDArray[np.uint64]] = []
        events: Counter[str] = Counter()
        with ExitStack() as stack:
            writer = stack.enter_context(SplitWriter(folder, split))
            teacher_writer = None
            if teacher is not None:
                (folder / TEACHER_DIRECTORY).mkdir(exist_ok=True)
                teacher_writer = stack.enter_context(
                    SplitWriter(folder / TEACHER_DIRECTORY, split, texts=False)
                )
            progress = stack.enter_context(
                Progress(
                    len(rows), "samples", f"tokenize {split}", min_seconds=MIN_PROGRESS_SECONDS
                )
            )
            for lines, tokenized in self._tokenize(spool.lines(rows), teacher):
                for error in tokenized.errors:
                    self.invalid(error)
                events["invalid"] += len(tokenized.errors)
                selected = ~np.isin(tokenized.prompt_hashes, held_out_prompts)
                events[SEEN_IN_TRAINING] += int((~selected).sum())
                writer.write(tokenized.chunk.select(selected))
                if teacher_writer is not None and tokenized.teacher is not None:
                    teacher_writer.write(tokenized.teacher.select(selected))
                written.append(rows[progress.done + tokenized.places[selected]])
                prompts.append(tokenized.prompt_hashes[selected])
                cut_prompts.append(tokenized.cut_prompts[selected])
                progress.advance(len(lines))
        result.counts, result.rows = writer.counts, _concatenate(written, np.int64)
        result.prompt_hashes = _concatenate(prompts, np.uint64)
        events["same_prompt_when_cut"] = count_equal_cut_prompts(
            result.prompt_hashes, _concatenate(cut_prompts, np.uint64)
        )
        result.counts.add_events(events)
        if teacher_writer is not None:
            result.teacher_events = teacher_writer.counts.events
        return result

    def _tokenize(
        self, lines: Iterator[str], teacher: SampleTokenizer | None
    ) -> Iterator[tuple[list[str], TokenizedLines]]:
        return map_chunks(
            lambda chunk: tokenize_lines(chunk, self.tokenizer, teacher),
            chunks_of_lines(lines),
            self.num_workers,
        )


def tokenize_lines(
    lines: Sequence[str], tokenizer: SampleTokenizer, teacher: SampleTokenizer | None
) -> TokenizedLines:
    """Tokenize the samples of these lines. An error of a template leaves its sample out."""
    errors: list[DataError] = []

    def on_invalid(_: Sample, error: DataError) -> None:
        errors.append(template_error(error))

    samples = list(map(Sample.from_json, lines))
    chunk = tokenize_chunk(samples, tokenizer, on_invalid, lines=lines)
    places = _places(samples, chunk.ids)
    teacher_chunk = None
    if teacher is not None:
        shared = [samples[place] for place in places]
        teacher_chunk = tokenize_chunk(shared, teacher, on_invalid)
        selected = np.zeros(len(shared), bool)
        selected[_places(shared, teacher_chunk.ids)] = True
        chunk, places = chunk.select(selected), places[selected]
    prompt_hashes = np.zeros(len(places), np.uint64)
    cut_prompts = np.zeros(len(places), np.uint64)
    data = chunk.tokens.tobytes()
    rows = zip(places.tolist(), chunk.index[:, :2].tolist(), chunk.truncated.tolist())
    for number, (place, (start, prompt_tokens), truncated) in enumerate(rows):
        if samples[place].prompt:
            prompt_hashes[number] = _hash(data[4 * start : 4 * (start + prompt_tokens)])
            if truncated:
                text = tokenizer.render_prompt(samples[place])
                cut_prompts[number] = _hash(text.encode(errors="surrogatepass"))
    return TokenizedLines(chunk, teacher_chunk, places, prompt_hashes, cut_prompts, errors)


def _places(samples: Sequence[Sample], ids: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Places of these ids, which are a part of those of the samples in the same order."""
    places, remaining = [], iter(enumerate(samples))
    for sample_id in ids.tolist():
        places.append(next(n for n, sample in remaining if sample.id.encode() == sample_id))
    return np.array(places, np.int64)


def count_equal_cut_prompts(
    prompt_hashes: NDArray[np.uint64], cut_prompts: NDArray[np.uint64]
) -> int:
    """Number of cut samples whose prompt equals that of another cut sample with another text.

    prompt_hashes, cut_prompts: see `TokenizedLines`.
    """
    cut = cut_prompts != 0
    pairs = np.unique(np.stack([prompt_hashes[cut], cut_prompts[cut]]), axis=1)
    prompts, texts = np.unique(pairs[0], return_counts=True)
    return int(np.isin(prompt_hashes[cut], prompts[texts > 1]).sum())


def _hash(data: bytes) -> int:
    """A hash of 64 bits that is not 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def _concatenate(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])


def save_split_array(folder: Path, name: str, values: NDArray[Any]) -> None:
    """Write an array of a split, as in `train.sources.npy`."""
    with (folder / f"{name}.npy").open("wb") as stream:
        save_array(stream, values)


def log_split(split: str, result: SplitResult) -> None:
    """Log the size of a split, and what was cut or left out."""
    counts = result.counts
    total = counts.samples + counts.dropped
    log.info(
        "%s: %s samples, %s tokens, %s of them train; %s truncated, %s dropped",
        split,
        *(
            f"{number:,}"
            for number in (
                counts.samples,
                counts.tokens,
                counts.loss_tokens,
                counts.truncated,
                counts.dropped,
            )
        ),
    )
    _log_events(split, counts.events, total)
    _log_events(f"{split} as the teacher reads it", result.teacher_events, total)


def _log_events(label: str, events: Mapping[str, int], total: int) -> None:
    for name, count in events.items():
        warn = name in WARN_EVENTS or count > WARN_SHARE * total
        log.log(
            logging.WARNING if warn else logging.INFO,
            "%s: %s of %s samples (%.1f%%) %s",
            label,
            f"{count:,}",
            f"{total:,}",
            100 * count / total,
            SPLIT_EVENTS.get(name, name),
        )
