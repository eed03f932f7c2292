"""Samples as text for the terminal: conversations, or tokens with those that train, with their
scores and places in the difficulty ranking.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.data.conversation import ASSISTANT, Message, Sample, read_sample_file
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

LINE_WIDTH, MAX_TEXT_LENGTH = 100, 1200  # characters


def format_samples(
    run: RunDirectory,
    *,
    split: str = "train",
    subset: int | None = None,
    count: int = 5,
    tokenizer: Any = None,
) -> list[str]:
    """Format `count` samples, spread evenly over a split or over one subset of the ranking.

    Ranked samples come from easy to hard. subset: from 1. tokenizer: of the student; also shows the
    tokens of each sample, and which of them train. Raises RecipeError for a subset that does not
    exist, ArtifactError if the data or the ranking is unfinished.
    """
    if read_manifest(run.data) is None:
        raise ArtifactError(f"{run.data} holds no finished data: run `pocl preprocess` first")
    if count < 1:
        raise RecipeError(f"--n {count}: ask for at least one sample")
    path = run.data / f"{split}.jsonl"
    total = sum(1 for _ in read_sample_file(path))
    if not total:
        raise ArtifactError(f"{path} holds no samples: choose another --split")

    # The candidate rows, ordered by difficulty if there is a ranking.
    rows, captions = np.arange(total), dict[int, str]()
    if subset is not None or (split == "train" and read_manifest(run.ranking) is not None):
        if split != "train":
            raise RecipeError(
                f"--subset {subset} belongs to the ranking, which holds training samples: leave "
                f"--split {split} out"
            )
        rows, captions = _ranked_rows(run, subset)

    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    shown_rows = [int(rows[place]) for place in places]
    samples = dict(zip(sorted(shown_rows), read_sample_file(path, set(shown_rows))))
    texts = [_format_sample(samples[row], captions.get(row, "")) for row in shown_rows]
    if tokenizer is None:
        return texts
    tokenized = TokenizedSplit.open(run.data, split)
    return [
        f"{text}\n{_format_tokens(tokenized, row, tokenizer)}"
        for text, row in zip(texts, shown_rows, strict=True)
    ]


def _ranked_rows(run: RunDirectory, subset: int | None) -> tuple[Any, dict[int, str]]:
    """Rows of data/train from easy to hard, and a caption of each with its place and scores."""
    if read_manifest(run.ranking) is None:
        raise ArtifactError(
            f"{run.ranking} holds no finished ranking: run `pocl rank` first, or leave --subset out"
        )
    order = np.load(run.ranking / "order.npy")
    table: Mapping[str, Any] = pq.read_table(run.ranking / "ranking.parquet").to_pydict()

    # The part of the order that the subset covers.
    start, stop = 0, len(order)
    if subset is not None:
        if read_manifest(run.plan) is None:
            raise ArtifactError(
                f"{run.plan} holds no finished plan, which defines the subsets: run `pocl plan` "
                "first"
            )
        ends = read_json(run.plan / "plan.json")["subset_ends"]
        if not 1 <= subset <= len(ends):
            raise RecipeError(f"--subset {subset}: the plan has subsets 1 to {len(ends)}")
        start, stop = [0, *ends][subset - 1], ends[subset - 1]

    metrics = [name for name in ("rouge_l", "cross_entropy") if name in table]
    captions = {}
    for place in range(start, stop):
        scores = [f"{name} {table[name][place]:.3f}" for name in metrics]
        captions[int(order[place])] = "  ".join([f"place {place + 1} of {len(order)}", *scores])
    return order[start:stop], captions


def _format_sample(sample: Sample, caption: str) -> str:
    source = f"of {_escape(sample.source)}" if sample.source else ""
    header = "  ".join(filter(None, [f"── {_escape(sample.id)}", source, caption]))
    parts = [("tool schema", _to_json(tool)) for tool in sample.tools]
    for message in sample.messages:
        parts += _message_parts(message)
    if sample.input:
        parts.insert(len(parts) - len(_message_parts(sample.response)), ("input", sample.input))
    parts += [("other reference", text) for text in sample.other_references]
    return "\n".join([header, *(_format_text(label, text) for label, text in parts if text)])


def _message_parts(message: Message) -> list[tuple[str, str]]:
    """What a message consists of: labels and texts."""
    name = f" {message.name}" if message.name else ""
    call = f", result of {message.tool_call_id}" if message.tool_call_id else ""
    untrained = "" if message.train or message.role != ASSISTANT else ", train: false"
    label = _escape(f"{message.role}{name}{call}{untrained}")
    calls = [(f"{label}, tool call", _to_json(tool_call)) for tool_call in message.tool_calls]
    return [(f"{label}, thought", message.reasoning_content), (label, message.content), *calls]


def _format_tokens(split: TokenizedSplit, row: int, tokenizer: Any) -> str:
    """The tokens of a sample as `token:id`, in runs of those that train and those that do not."""
    ids, mask = split.tokens(row).tolist(), split.loss_mask(row)
    lines = [f"tokens: {len(ids)}, of which {int(mask.sum())} train"]
    for start, stop in _runs(mask):
        part = ids[start:stop]
        tokens = zip(tokenizer.convert_ids_to_tokens(part), part, strict=True)
        lines += [
            f"  {len(part)} {'that train' if mask[start] else 'without a loss'}:",
            _indented(repr(tokenizer.decode(part))),
            _indented(" ".join(f"{token}:{number}" for token, number in tokens)),
        ]
    return "\n".join(lines)


def _runs(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal values."""
    changes = np.flatnonzero(np.diff(mask)) + 1
    yield from pairwise([0, *changes.tolist(), len(mask)])


def _format_text(label: str, text: str) -> str:
    return f"{label}:\n{_indented(text, 2)}"


def _indented(text: str, width: int = 4) -> str:
    """The text in lines of LINE_WIDTH, at most MAX_TEXT_LENGTH characters of it."""
    omitted = len(text) - MAX_TEXT_LENGTH
    if omitted > 0:
        text = f"{text[:MAX_TEXT_LENGTH]} … ({omitted} more characters)"
    body = "\n".join(textwrap.fill(line, LINE_WIDTH) for line in _escape(text).split("\n"))
    return textwrap.indent(body, " " * width)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _escape(text: str) -> str:
    """Escape control characters, so that the terminal does not interpret escape sequences."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )
