"""Write tokenized splits: from samples to the files that `TokenizedSplit` reads."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.conversation import Sample
from pocl_ds.data.sample_tokenizer import OnInvalidSample, SampleTokenizer
from pocl_ds.data.tokenized import INDEX_COLUMNS
from pocl_ds.workflow.files import save_array

SAMPLES_PER_CHUNK = 512  # tokenized together


@dataclass
class TokenizationCounts:
    """Counts of one split: samples and tokens written, samples truncated and left out."""

    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    events: dict[str, int] = field(default_factory=dict)  # see `sample_tokenizer.EVENTS`

    def add_events(self, events: Mapping[str, int]) -> None:
        """Add counts of events."""
        for name, count in events.items():
            if count:
                self.events[name] = self.events.get(name, 0) + count


@dataclass(frozen=True)
class TokenizedChunk:
    """Tokenized samples in arrays, as one process hands them to another."""

    lines: list[str]  # `Sample.to_json` of each sample
    ids: NDArray[np.bytes_]  # [samples]
    index: NDArray[np.int64]  # [samples, INDEX_COLUMNS], starts from 0 in the chunk
    tokens: NDArray[np.uint32]  # [tokens]
    loss_mask: NDArray[np.bool_]  # [tokens]
    truncated: NDArray[np.bool_]  # [samples]
    dropped: int
    events: dict[str, int]

    def select(self, selected: NDArray[np.bool_]) -> TokenizedChunk:
        """The chunk with these samples alone, the others counted as dropped. selected:
        [samples].
        """
        if selected.all():
            return self
        tokens = np.repeat(selected, self.index[:, 2])
        index = self.index[selected]
        index[:, 0] = np.cumsum(index[:, 2]) - index[:, 2]
        return TokenizedChunk(
            lines=list(itertools.compress(self.lines, selected)),
            ids=self.ids[selected],
            index=index,
            tokens=self.tokens[tokens],
            loss_mask=self.loss_mask[tokens],
            truncated=self.truncated[selected],
            dropped=self.dropped + int((~selected).sum()),
            events=self.events,
        )


def tokenize_chunk(
    samples: Sequence[Sample],
    tokenizer: SampleTokenizer,
    on_invalid: OnInvalidSample | None = None,
    *,
    lines: Sequence[str] = (),
) -> TokenizedChunk:
    """Tokenize samples together.

    on_invalid: see `SampleTokenizer.tokenize_many`. lines: `Sample.to_json` of each, if it is known
    already.
    """
    tokenizer.counts.clear()
    cleaned = [tokenizer.clean(sample) for sample in samples]
    results = tokenizer.tokenize_many(cleaned, on_invalid)
    included = [(cleaned[n], tokens) for n, tokens in enumerate(results) if tokens is not None]
    rows, start = [], 0
    for _, tokens in included:
        # Token 0 has no hidden state before it, so it is never a label.
        loss_tokens = int(np.count_nonzero(tokens.loss_mask[1:]))
        rows.append((start, tokens.prompt_tokens, len(tokens.ids), loss_tokens))
        start += len(tokens.ids)
    names = [sample.id.encode() for sample, _ in included]
    token_arrays = [np.asarray(tokens.ids, np.uint32) for _, tokens in included]
    masks = [tokens.loss_mask for _, tokens in included]
    return TokenizedChunk(
        lines=[
            lines[n] if lines and cleaned[n] is samples[n] else cleaned[n].to_json()
            for n, tokens in enumerate(results)
            if tokens is not None
        ],
        ids=np.array(names, "S") if names else np.empty(0, "S1"),
        index=np.array(rows, np.int64).reshape(-1, INDEX_COLUMNS),
        tokens=np.concatenate(token_arrays) if masks else np.empty(0, np.uint32),
        loss_mask=np.concatenate(masks) if masks else np.empty(0, np.bool_),
        truncated=np.array([tokens.truncated for _, tokens in included], np.bool_),
        dropped=len(samples) - len(included),
        events=dict(tokenizer.counts),
    )


class SplitWriter:
    """Streams the chunks of a split to disk, with `texts` also as a jsonl file."""

    def __init__(self, directory: Path, split: str, *, texts: bool = True) -> None:
        self.directory, self.split, self.texts = directory, split, texts
        self.counts = TokenizationCounts()
        self._index: list[NDArray[np.int64]] = []
        # Arrays, since ten million bytes objects take three times the memory.
        self._ids: list[NDArray[np.bytes_]] = []
        self._files = contextlib.ExitStack()

    def __enter__(self) -> SplitWriter:
        prefix = f"{self.directory}/{self.split}"
        self._tokens = self._files.enter_context(open(f"{prefix}.tokens.bin", "wb"))
        self._loss_mask = self._files.enter_context(open(f"{prefix}.loss_mask.bin", "wb"))
        if self.texts:
            self._lines = self._files.enter_context(open(f"{prefix}.jsonl", "w", encoding="utf-8"))
        return self

    def write(self, chunk: TokenizedChunk) -> None:
        """Append a chunk."""
        counts = self.counts
        chunk.index[:, 0] += counts.tokens
        self._index.append(chunk.index)
        self._ids.append(chunk.ids)
        # `ndarray.tofile` does not report a full disk.
        self._tokens.write(chunk.tokens.tobytes())
        self._loss_mask.write(chunk.loss_mask.tobytes())
        if self.texts:
            self._lines.writelines(f"{line}\n" for line in chunk.lines)
        counts.samples += len(chunk.ids)
        counts.tokens += len(chunk.tokens)
        counts.loss_tokens += int(chunk.index[:, 3].sum())
        counts.truncated += int(chunk.truncated.sum())
        counts.dropped += chunk.dropped
        counts.add_events(chunk.events)

    def __exit__(self, *error: object) -> None:
        self._files.close()
        if error[0] is not None:
            return
        # The index and the sample ids, one row per sample.
        arrays = {
            "index": np.concatenate(self._index)
            if self._index
            else np.empty((0, INDEX_COLUMNS), np.int64),
            "ids": np.concatenate(self._ids) if self._ids else np.empty(0, "S1"),
        }
        for name, array in arrays.items():
            with (self.directory / f"{self.split}.{name}.npy").open("wb") as stream:
                save_array(stream, array)


def write_tokenized_split(
    samples: Iterable[Sample],
    tokenizer: SampleTokenizer,
    directory: Path,
    split: str,
    *,
    texts: bool = True,
) -> TokenizationCounts:
    """Tokenize samples in this process and stream them to disk."""
    with SplitWriter(directory, split, texts=texts) as writer:
        for chunk in in_chunks(samples, SAMPLES_PER_CHUNK):
            writer.write(tokenize_chunk(chunk, tokenizer))
    return writer.counts


def save_split(
    directory: Path,
    split: str,
    ids: Sequence[str],
    sequences: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
) -> None:
    """Write token sequences whose tokens after the prompt train, without texts."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    starts, prompts = np.cumsum(lengths) - lengths, np.asarray(prompt_tokens, np.int64)
    masks = [np.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)]
    chunk = TokenizedChunk(
        lines=[],
        ids=np.array([name.encode() for name in ids], "S") if ids else np.empty(0, "S1"),
        index=np.stack([starts, prompts, lengths, lengths - np.maximum(prompts, 1)], 1),
        tokens=np.array([token for sequence in sequences for token in sequence], np.uint32),
        loss_mask=np.concatenate(masks) if masks else np.empty(0, np.bool_),
        truncated=np.zeros(len(ids), np.bool_),
        dropped=0,
        events={},
    )
    with SplitWriter(directory, split, texts=False) as writer:
        writer.write(chunk)


def in_chunks(items: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Consecutive lists of at most `size` items."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
