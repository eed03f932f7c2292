"""Tokenized splits: samples become token ids on disk once, and are read back as memory maps.

A sample is the ids of its prompt, the ids of its response, and the EOS that ends it. Prompt and
response are tokenized separately, so a prompt has the same ids in scoring, training and evaluation.
Lengths are stored, so the padding id may equal EOS.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.generated import count_loss_tokens
from pocl_ds.data.templates import load_template
from pocl_ds.errors import ArtifactError, DataError, ModelError
from pocl_ds.workflow.files import save_array

SAMPLES_PER_CHUNK = 512  # tokenized together
TOKENS_PER_BLOCK = 1 << 22  # searched together


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Token ids of prompt, response and EOS; `truncated` if some of them were cut off."""

    ids: list[int]
    prompt_tokens: int
    truncated: bool


class SampleTokenizer:
    """Turns samples into token ids with one tokenizer and one prompt configuration."""

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        """Raises ModelError if the tokenizer has no EOS token."""
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, so a response would never end: set eos_token in "
                "its folder"
            )
        self.tokenizer, self.config = tokenizer, config
        self.template = load_template(config.template, tokenizer, config.chat_template_kwargs)

    def tokenize_prompt(self, sample: Sample) -> list[int]:
        """The first prompt.max_prompt_tokens ids of a sample's prompt.

        Raises DataError if the prompt is empty.
        """
        return self._truncated_prompt(sample, self.template.token_ids(sample))

    def tokenize_prompts(self, samples: Sequence[Sample]) -> tuple[list[list[int]], int]:
        """Tokenize many prompts, and count those that were cut.

        Every prompt needs a response, so prompt.overlong=drop has no effect.
        Raises DataError if a prompt is empty, or too long with prompt.overlong=error.
        """
        prompts, limit = self.template.token_ids_batch(samples), self.config.max_prompt_tokens
        overlong = [index for index, ids in enumerate(prompts) if len(ids) > limit]
        if overlong and self.config.overlong == "error":
            raise DataError(
                f"sample {samples[overlong[0]].id} has {len(prompts[overlong[0]])} prompt tokens "
                f"(limit {limit}): raise prompt.max_prompt_tokens, or set prompt.overlong"
            )
        truncated = [
            self._truncated_prompt(sample, ids)
            for sample, ids in zip(samples, prompts, strict=True)
        ]
        return truncated, len(overlong)

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """Tokenize prompt, response and EOS, at most prompt.max_length ids.

        A truncated response has no EOS. Raises DataError as `tokenize_prompts` does.
        """
        response = self._tokenize_responses([sample])[0]
        return self._join(sample, self.template.token_ids(sample), response)

    def tokenize_many(self, samples: Sequence[Sample]) -> list[TokenizedSample | None]:
        """Tokenize many samples at once; None for a sample that prompt.overlong=drop leaves out."""
        prompts, responses = (
            self.template.token_ids_batch(samples),
            self._tokenize_responses(samples),
        )
        tokenized: list[TokenizedSample | None] = []
        for sample, prompt, response in zip(samples, prompts, responses, strict=True):
            result = self._join(sample, prompt, response)
            dropped = result.truncated and self.config.overlong == "drop"
            tokenized.append(None if dropped else result)
        return tokenized

    def _tokenize_responses(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [sample.references[0] for sample in samples]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _truncated_prompt(self, sample: Sample, prompt: list[int]) -> list[int]:
        if not prompt:  # nothing would predict the first token of the response
            raise DataError(
                f"sample {sample.id}: prompt.template={self.config.template} gives an empty "
                f"prompt: fix it"
            )
        return prompt[: self.config.max_prompt_tokens]

    def _join(self, sample: Sample, prompt: list[int], response: list[int]) -> TokenizedSample:
        prompt_limit, limit = self.config.max_prompt_tokens, self.config.max_length
        ids = [*self._truncated_prompt(sample, prompt), *response]
        if sample.ended or not response:  # a sample needs at least one loss token
            ids.append(self.tokenizer.eos_token_id)
        truncated = len(prompt) > prompt_limit or len(ids) > limit
        if truncated and self.config.overlong == "error":
            raise DataError(
                f"sample {sample.id} has {len(prompt)} prompt tokens (limit {prompt_limit}) and "
                f"{len(prompt) + len(response) + 1} in all (limit {limit}): raise "
                "prompt.max_prompt_tokens or prompt.max_length, or set prompt.overlong"
            )
        return TokenizedSample(ids[:limit], min(len(prompt), prompt_limit), truncated)


class TokenizedSplit:
    """A tokenized split on disk, memory-mapped (a `TokenizedDataset`).

    Row i of every array is line i of the split's jsonl file.
    """

    def __init__(self, directory: Path, split: str) -> None:
        """Raises ArtifactError if a file is missing or damaged."""
        paths = [directory / f"{split}.{part}" for part in ("ids.npy", "index.npy", "tokens.bin")]
        for path in paths:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: run `pocl preprocess` first")
        try:
            self.ids: NDArray[np.bytes_] = np.load(paths[0], mmap_mode="r")
            index = np.load(paths[1], mmap_mode="r")
            self.starts, self.prompt_tokens, self.total_tokens = (
                index[:, 0],
                index[:, 1],
                index[:, 2],
            )
            empty = paths[2].stat().st_size == 0  # an empty file cannot be mapped
            self._tokens = np.empty(0, np.uint32) if empty else np.memmap(paths[2], np.uint32, "r")
            expected = int(self.starts[-1] + self.total_tokens[-1]) if len(index) else 0
            if len(self._tokens) != expected:
                raise ValueError(f"{len(self._tokens)} tokens instead of {expected}")
        except (ValueError, IndexError, EOFError) as error:
            raise ArtifactError(
                f"{directory}/{split}.* is damaged ({error}): remove {directory} and run its step "
                "again"
            ) from None
        self._rows_by_id: NDArray[np.int64] | None = None
        self.name, self._path = split, f"{directory}/{split}"

    @classmethod
    def open(cls, directory: Path, split: str) -> TokenizedSplit:
        """Open the split `train`, `validation` or `test` of a data directory.

        Raises ArtifactError if it is missing or damaged.
        """
        return cls(directory, split)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """See `TokenizedDataset`."""
        return count_loss_tokens(self.total_tokens, self.prompt_tokens)

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """See `TokenizedDataset`."""
        start = int(self.starts[row])
        return self._tokens[start : start + int(self.total_tokens[row])]

    def prompt_source(self, row: int) -> tuple[str, int]:
        """See `TokenizedDataset`."""
        return self.name, row

    def find_disallowed_token(
        self,
        allowed: NDArray[np.bool_],
        *,
        prompts: NDArray[np.bool_],
        rows: NDArray[np.int64] | None = None,
    ) -> tuple[int, int] | None:
        """Row and id of the first token that is not `allowed` [vocabulary], None if there is none.

        Prompts may also hold the ids in `prompts` [vocabulary]. rows: search only these.
        """
        for start in range(0, len(self._tokens), TOKENS_PER_BLOCK):
            tokens = np.asarray(self._tokens[start : start + TOKENS_PER_BLOCK])
            in_vocabulary, clipped = tokens < len(allowed), np.minimum(tokens, len(allowed) - 1)
            for place in np.flatnonzero(~(in_vocabulary & allowed[clipped])):
                row = int(np.searchsorted(self.starts, start + place, side="right")) - 1
                if rows is not None and row not in rows:
                    continue
                prompt_end = int(self.starts[row]) + int(self.prompt_tokens[row])
                in_prompt = start + place < prompt_end
                if not in_prompt or not (in_vocabulary[place] and prompts[clipped[place]]):
                    return row, int(tokens[place])
        return None

    def rows_of(self, ids: Sequence[str] | NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Rows of these sample ids: [ids]. Raises ArtifactError for an id that the split lacks."""
        keys = (
            ids
            if isinstance(ids, np.ndarray)
            else np.array([name.encode() for name in ids], dtype="S")
        )
        if not len(keys):
            return np.empty(0, np.int64)
        if self._rows_by_id is None:
            self._rows_by_id = np.argsort(self.ids, kind="stable")
        if not len(self):
            missing = np.ones(len(keys), bool)
        else:
            places = np.searchsorted(self.ids, keys, sorter=self._rows_by_id)
            rows = self._rows_by_id[np.minimum(places, len(self) - 1)]
            missing = self.ids[rows] != keys
        if missing.any():
            raise ArtifactError(
                f"sample {keys[int(np.argmax(missing))].decode()} is not in {self._path}: run its "
                f"step again"
            )
        return rows


def shard_rows(samples: int, shard: int, shards: int) -> range:
    """Consecutive rows of a split in one shard; the sizes of shards differ by at most one."""
    return range(shard * samples // shards, (shard + 1) * samples // shards)


@dataclass
class TokenizationCounts:
    """Counts of one split: samples and tokens written, samples truncated and dropped."""

    samples: int = 0
    tokens: int = 0
    response_tokens: int = 0
    truncated: int = 0
    dropped: int = 0


def write_tokenized_split(
    samples: Iterable[Sample],
    tokenizer: SampleTokenizer,
    directory: Path,
    split: str,
    *,
    texts: bool = True,
) -> TokenizationCounts:
    """Tokenize samples and stream them to disk, with `texts` also as a jsonl file."""
    counts = TokenizationCounts()
    index: list[NDArray[np.int64]] = []
    # Arrays, since ten million bytes objects take three times the memory.
    ids: list[NDArray[np.bytes_]] = []
    with contextlib.ExitStack() as stack:
        jsonl = (
            stack.enter_context((directory / f"{split}.jsonl").open("w", encoding="utf-8"))
            if texts
            else None
        )
        binary = stack.enter_context((directory / f"{split}.tokens.bin").open("wb"))
        for chunk in in_chunks(samples, SAMPLES_PER_CHUNK):
            rows: list[tuple[int, int, int]] = []
            chunk_ids: list[bytes] = []
            for sample, tokenized in zip(chunk, tokenizer.tokenize_many(chunk), strict=True):
                if tokenized is None:
                    counts.dropped += 1
                    continue
                rows.append((counts.tokens, tokenized.prompt_tokens, len(tokenized.ids)))
                counts.samples += 1
                counts.tokens += len(tokenized.ids)
                counts.response_tokens += len(tokenized.ids) - tokenized.prompt_tokens
                counts.truncated += tokenized.truncated
                chunk_ids.append(sample.id.encode())
                if jsonl:
                    jsonl.write(sample.to_json() + "\n")
                # `ndarray.tofile` does not report a full disk.
                binary.write(np.asarray(tokenized.ids, np.uint32).tobytes())
            index.append(np.array(rows, np.int64).reshape(-1, 3))
            ids.append(np.array(chunk_ids, "S") if chunk_ids else np.empty(0, "S1"))

    # The index (start, prompt tokens, total tokens) and the sample ids, one row per sample.
    arrays = {
        "index": np.concatenate(index) if index else np.empty((0, 3), np.int64),
        "ids": np.concatenate(ids) if ids else np.empty(0, "S1"),
    }
    for name, array in arrays.items():
        with (directory / f"{split}.{name}.npy").open("wb") as stream:
            save_array(stream, array)
    return counts


def in_chunks(items: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Consecutive lists of at most `size` items."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
