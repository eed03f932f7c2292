"""From samples to token ids on disk, and back as memory maps: tokenised once, never a Python list
of all.

A sample is its prompt's ids, its response's ids, and the EOS that ends it. The prompt's ids are the
same in scoring, training and evaluation, because the response is tokenised apart and put behind
them. Lengths are kept, so that a padding id that equals EOS does no harm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import PromptConfig
from pocl_ds.data.generated import count_loss_tokens
from pocl_ds.data.records import Sample
from pocl_ds.data.templates import load_template
from pocl_ds.errors import ArtifactError, DataError, ModelError
from pocl_ds.workflow.run_dir import save_array

BATCH = 512  # samples tokenised together
BLOCK = 1 << 22  # tokens looked at together


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: prompt, response and EOS; `truncated` where something was cut off."""

    ids: list[int]
    prompt_tokens: int
    truncated: bool


class Encoder:
    """Encodes samples for one tokenizer and one prompt configuration."""

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, so a response would never end: set eos_token in "
                "its folder"
            )
        self.tokenizer, self.config = tokenizer, config
        self.template = load_template(config.template, tokenizer, config.chat_template_kwargs)

    def prompt(self, sample: Sample) -> list[int]:
        """The prompt's ids, the first max_prompt_tokens of them. Raises DataError where there are
        none.
        """
        return self._kept(sample, self.template.ids(sample))

    def prompts(self, samples: Sequence[Sample]) -> tuple[list[list[int]], int]:
        """As `prompt`, many at once, and how many were cut. None is left out, since each is to be
        answered.

        Raises DataError too for one that would be cut with prompt.overlong=error.
        """
        whole, limit = self.template.many(samples), self.config.max_prompt_tokens
        cut = [number for number, ids in enumerate(whole) if len(ids) > limit]
        if cut and self.config.overlong == "error":
            raise DataError(
                f"sample {samples[cut[0]].id} has {len(whole[cut[0]])} prompt tokens (limit "
                f"{limit}): raise "
                "prompt.max_prompt_tokens, or set prompt.overlong"
            )
        return [self._kept(sample, ids) for sample, ids in zip(samples, whole, strict=True)], len(
            cut
        )

    def sample(self, sample: Sample) -> Encoded:
        """Prompt, response and EOS, at most max_length ids; a response that is cut, here or before,
        has no EOS.
        """
        return self._join(sample, self.template.ids(sample), self._response([sample])[0])

    def samples(self, samples: Sequence[Sample]) -> list[Encoded | None]:
        """As `sample`, many at once; None for what prompt.overlong=drop leaves out."""
        prompts, responses = self.template.many(samples), self._response(samples)
        encoded: list[Encoded | None] = []
        for sample, prompt, response in zip(samples, prompts, responses, strict=True):
            one = self._join(sample, prompt, response)
            encoded.append(None if one.truncated and self.config.overlong == "drop" else one)
        return encoded

    def _response(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [sample.references[0] for sample in samples]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _kept(self, sample: Sample, prompt: list[int]) -> list[int]:
        if not prompt:  # the first token of a response would follow from nothing
            raise DataError(
                f"sample {sample.id}: prompt.template={self.config.template} gives an empty "
                f"prompt: mend it"
            )
        return prompt[: self.config.max_prompt_tokens]

    def _join(self, sample: Sample, prompt: list[int], response: list[int]) -> Encoded:
        limit, longest = self.config.max_prompt_tokens, self.config.max_length
        whole = [*self._kept(sample, prompt), *response]
        if sample.ended or not response:  # something must be learnt from
            whole.append(self.tokenizer.eos_token_id)
        truncated = len(prompt) > limit or len(whole) > longest
        if truncated and self.config.overlong == "error":
            raise DataError(
                f"sample {sample.id} has {len(prompt)} prompt tokens (limit {limit}) and "
                f"{len(prompt) + len(response) + 1} in "
                f"all (limit {longest}): raise prompt.max_prompt_tokens or prompt.max_length, or "
                f"set prompt.overlong"
            )
        return Encoded(whole[:longest], min(len(prompt), limit), truncated)


class EncodedSplit:
    """A split on disk, memory-mapped. Row i of every array is line i of the split's jsonl."""

    def __init__(self, directory: Path, split: str) -> None:
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
            empty = paths[2].stat().st_size == 0  # nothing can be mapped there
            self._tokens = np.empty(0, np.uint32) if empty else np.memmap(paths[2], np.uint32, "r")
            if len(self._tokens) != (
                end := int(self.starts[-1] + self.total_tokens[-1]) if len(index) else 0
            ):
                raise ValueError(f"{len(self._tokens)} tokens instead of {end}")
        except (ValueError, IndexError, EOFError) as error:
            fault = f"{directory}/{split}.* is damaged ({error}): remove {directory} and run its stage again"
            raise ArtifactError(fault) from None
        self._by_id: NDArray[np.int64] | None = None
        self.name, self._name = split, f"{directory}/{split}"

    @classmethod
    def open(cls, directory: Path, split: str) -> EncodedSplit:
        """The split `train`, `validation` or `test` of a data directory. Raises ArtifactError where
        it is not there.
        """
        return cls(directory, split)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """See `written.Sequences`."""
        return count_loss_tokens(self.total_tokens, self.prompt_tokens)

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """All ids of a sample: [total_tokens]."""
        start = int(self.starts[row])
        return self._tokens[start : start + int(self.total_tokens[row])]

    def prompt_of(self, row: int) -> tuple[str, int]:
        """See `written.Sequences`."""
        return self.name, row

    def first_outside(
        self,
        allowed: NDArray[np.bool_],
        *,
        prompts: NDArray[np.bool_],
        rows: NDArray[np.int64] | None = None,
    ) -> tuple[int, int] | None:
        """Row and id of the first token that is not `allowed` [ids] in a response, or in a prompt
        neither that nor in `prompts`.

        prompts: [ids]. rows: only these rows count.
        """
        for start in range(0, len(self._tokens), BLOCK):
            tokens = np.asarray(self._tokens[start : start + BLOCK])
            known, clipped = tokens < len(allowed), np.minimum(tokens, len(allowed) - 1)
            for place in np.flatnonzero(~(known & allowed[clipped])):
                row = int(np.searchsorted(self.starts, start + place, side="right")) - 1
                if rows is not None and row not in rows:
                    continue
                asked = start + place < int(self.starts[row]) + int(self.prompt_tokens[row])
                if not asked or not (known[place] and prompts[clipped[place]]):
                    return row, int(tokens[place])
        return None

    def rows_of(self, ids: Sequence[str] | NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Rows of some ids. Raises ArtifactError naming the first that is not there."""
        wanted = (
            ids
            if isinstance(ids, np.ndarray)
            else np.array([name.encode() for name in ids], dtype="S")
        )
        if self._by_id is None:
            self._by_id = np.argsort(self.ids, kind="stable")
        if not len(wanted):
            return np.empty(0, np.int64)
        place = (
            np.searchsorted(self.ids, wanted, sorter=self._by_id)
            if len(self)
            else np.zeros(len(wanted), np.int64)
        )
        rows = self._by_id[np.minimum(place, len(self) - 1)] if len(self) else place
        wrong = self.ids[rows] != wanted if len(self) else np.ones(len(wanted), bool)
        if wrong.any():
            raise ArtifactError(
                f"sample {wanted[int(np.argmax(wrong))].decode()} is not in {self._name}: run its "
                f"stage again"
            )
        return rows


def shard_rows(samples: int, shard: int, shards: int) -> range:
    """Rows of a split in one shard: neighbours, sizes differ by at most one."""
    return range(shard * samples // shards, (shard + 1) * samples // shards)


@dataclass
class EncodingCounts:
    """What became of a split's samples."""

    samples: int = 0
    tokens: int = 0
    response_tokens: int = 0
    truncated: int = 0
    dropped: int = 0


def encode_split(
    samples: Iterable[Sample], encoder: Encoder, directory: Path, split: str, *, texts: bool = True
) -> EncodingCounts:
    """Write a split's encoding below `directory`, streaming, and with `texts` its jsonl too."""
    counts = EncodingCounts()
    index: list[NDArray[np.int64]] = []
    ids: list[
        NDArray[np.bytes_]
    ] = []  # arrays: ten million bytes objects would take three times as much
    with (
        (directory / f"{split}.jsonl").open("w", encoding="utf-8")
        if texts
        else contextlib.nullcontext() as lines,
        (directory / f"{split}.tokens.bin").open("wb") as binary,
    ):
        for chunk in batched(samples, BATCH):
            rows: list[tuple[int, int, int]] = []
            kept: list[bytes] = []
            for sample, encoded in zip(chunk, encoder.samples(chunk), strict=True):
                if encoded is None:
                    counts.dropped += 1
                    continue
                rows.append((counts.tokens, encoded.prompt_tokens, len(encoded.ids)))
                counts.samples += 1
                counts.tokens += len(encoded.ids)
                counts.response_tokens += len(encoded.ids) - encoded.prompt_tokens
                counts.truncated += encoded.truncated
                kept.append(sample.id.encode())
                if lines:
                    lines.write(sample.to_json() + "\n")
                binary.write(
                    np.asarray(encoded.ids, np.uint32).tobytes()
                )  # `tofile` misses a full disk
            index.append(np.array(rows, np.int64).reshape(-1, 3))
            ids.append(np.array(kept, "S") if kept else np.empty(0, "S1"))
    table = np.concatenate(index) if index else np.empty((0, 3), np.int64)
    for name, array in (
        ("index", table),
        ("ids", np.concatenate(ids) if ids else np.empty(0, "S1")),
    ):
        with (directory / f"{split}.{name}.npy").open("wb") as stream:
            save_array(stream, array)
    return counts


def batched(items: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Consecutive lists of at most `size`."""
    iterator = iter(items)
    while True:
        chunk: list[Sample] = []
        with contextlib.suppress(StopIteration):
            while len(chunk) < size:
                chunk.append(next(iterator))
        if not chunk:
            return
        yield chunk
