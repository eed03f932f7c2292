"""Samples for the terminal, with what the ranking says of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pocl_ds.data.records import Sample, read_normalised
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.workflow.run_dir import RunDirectory, read_json, read_manifest

WIDTH, LONGEST = 100, 1200  # columns of a line, letters of a text


def show_samples(
    run: RunDirectory, *, split: str = "train", subset: int | None = None, count: int = 5
) -> list[str]:
    """Some samples as text, spread evenly over a split, or over a subset of the ranking, from easy
    to hard.

    subset: from 1. Raises RecipeError for one that is not there, ArtifactError where data or
    ranking is unfinished.
    """
    if read_manifest(run.data) is None:
        raise ArtifactError(f"{run.data} holds no finished data: run `pocl preprocess` first")
    if count < 1:
        raise RecipeError(f"--n {count}: ask for at least one sample")
    path = run.data / f"{split}.jsonl"
    total = sum(1 for _ in read_normalised(path))
    if not total:
        raise ArtifactError(f"{path} holds no samples: take another --split")
    rows, facts = np.arange(total), dict[int, str]()
    if subset is not None or (split == "train" and read_manifest(run.ranking) is not None):
        if split != "train":
            raise RecipeError(
                f"--subset {subset} is of the ranking, which holds training samples: leave "
                f"--split {split} out"
            )
        rows, facts = _ranked(run, subset)
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    wanted = [int(rows[place]) for place in places]
    found = {row: sample for row, sample in enumerate(read_normalised(path)) if row in set(wanted)}
    return [_text(found[row], facts.get(row, "")) for row in wanted]


def _ranked(run: RunDirectory, subset: int | None) -> tuple[Any, dict[int, str]]:
    """Rows of data/train in the order of the ranking, and what is known of each."""
    if read_manifest(run.ranking) is None:
        raise ArtifactError(
            f"{run.ranking} holds no finished ranking: run `pocl rank` first, or leave --subset out"
        )
    order = np.load(run.ranking / "order.npy")
    table: Mapping[str, Any] = pq.read_table(run.ranking / "ranking.parquet").to_pydict()
    first, last = 0, len(order)
    if subset is not None:
        if read_manifest(run.plan) is None:
            raise ArtifactError(
                f"{run.plan} holds no finished plan, which makes the subsets: run `pocl plan` first"
            )
        stops = [stage["stop"] for stage in read_json(run.plan / "plan.json")["stages"]]
        if not 1 <= subset <= len(stops):
            raise RecipeError(f"--subset {subset}: the plan has subsets 1 to {len(stops)}")
        first, last = [0, *stops][subset - 1], stops[subset - 1]
    names = [name for name in ("rouge_l", "cross_entropy") if name in table]
    facts = {
        int(order[place]): "  ".join(
            [f"place {place + 1} of {len(order)}", *(f"{n} {table[n][place]:.3f}" for n in names)]
        )
        for place in range(first, last)
    }
    return order[first:last], facts


def _text(sample: Sample, facts: str) -> str:
    lines = [f"── {_plain(sample.id)}  {facts}".rstrip()]
    parts = [*sample.history, ("instruction", sample.instruction), ("input", sample.input)]
    parts += [("reference", text) for text in sample.references]
    for label, text in parts:
        if text:
            shown = (
                text
                if len(text) <= LONGEST
                else f"{text[:LONGEST]} … ({len(text) - LONGEST} letters more)"
            )
            body = "\n".join(textwrap.fill(line, WIDTH) for line in _plain(shown).split("\n"))
            lines.append(f"{label}:\n{textwrap.indent(body, '  ')}")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Without what a terminal would obey: escape sequences in data are shown, not run."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )
