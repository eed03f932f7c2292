"""Difficulty as several students see it: do they agree which samples are hard, and is a hard sample
only a long one?

The paper orders the samples for one student (docs/method.md, eq. 3). What another student would have said
decides whether an order can be taken over, so runs that have been ranked are put side by side here:
spread, rank correlation, overlap of subsets, length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.curriculum.plan import subset_stops
from pocl_ds.curriculum.ranking import tied_fraction
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.runtime.formatting import align_columns
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

Floats = NDArray[np.float64]
SHARP = 0.5  # correlation with the length from which an order is called one of lengths


@dataclass(frozen=True)
class Seen:
    """A run's training samples, from easy to hard as its student finds them. Arrays: [samples], in
    that order.
    """

    name: str
    ids: NDArray[np.bytes_]
    rouge_l: Floats
    cross_entropy: Floats
    tokens: NDArray[np.int64]  # of the response that the data gives


def read_seen(run: RunDirectory, name: str) -> Seen:
    """What the stage `rank` found. Raises ArtifactError where it has not run, or had no scores to
    order by.
    """
    manifest = read_manifest(run.ranking)
    if manifest is None:
        raise ArtifactError(f"{run.path} has no ranking: run `pocl run --until rank` there first")
    table = pq.read_table(run.ranking / "ranking.parquet")
    if "rouge_l" not in table.column_names:
        raise ArtifactError(
            f"{run.path} is ordered by {manifest.info['strategy']}, without scores: give runs "
            f"that were scored"
        )
    split, order = TokenizedSplit.open(run.data, "train"), np.load(run.ranking / "order.npy")
    return Seen(
        name,
        np.asarray(split.ids)[order],
        table["rouge_l"].to_numpy(),
        table["cross_entropy"].to_numpy(),
        np.asarray(split.loss_tokens)[order],
    )


def ranks(values: Floats | NDArray[np.int64]) -> Floats:
    """Ranks from 0, [n]; tied values share their mean rank."""
    from scipy import stats

    return np.asarray(stats.rankdata(values) - 1)


def spearman(one: Floats | NDArray[np.int64], other: Floats | NDArray[np.int64]) -> float:
    """Spearman's rank correlation, -1 to 1, with tied values at their mean rank.

    NaN if there are fewer than two values, or one side is constant.
    """
    from scipy import stats

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.spearmanr(one, other).statistic)


def partial(one_other: float, one_third: float, other_third: float) -> float:
    """Correlation of two with a third held fixed (first-order partial correlation of ranks); NaN
    where the third says it all.
    """
    left = (1 - one_third**2) * (1 - other_third**2)
    return (one_other - one_third * other_third) / left**0.5 if left > 0 else float("nan")


@dataclass(frozen=True)
class Pair:
    """Two students on the samples that both have ranked."""

    samples: int
    difficulty: float  # Spearman's correlation of their places in the order
    rouge_l: float
    cross_entropy: float
    without_length: float  # of the places, with the length held fixed
    same_subset: float  # share of samples that both put into the same subset
    hardest: float  # share of one's hardest subset that is in the other's


def compare_pair(one: Seen, other: Seen, subsets: int) -> Pair:
    """How far two students agree. Subsets are cut anew from the samples in common. Raises
    ArtifactError for fewer than those.
    """
    common, first, second = np.intersect1d(
        one.ids, other.ids, assume_unique=True, return_indices=True
    )
    if len(common) < max(subsets, 2):
        raise ArtifactError(
            f"{one.name} and {other.name} have {len(common)} samples in common: compare runs of "
            f"the same data"
        )
    places = [ranks(first), ranks(second)]  # of the common samples alone
    parts = [_subset_of(place, subsets) for place in places]
    length = one.tokens[first]
    alike = spearman(places[0], places[1])
    last = [part == subsets - 1 for part in parts]
    return Pair(
        len(common),
        alike,
        spearman(one.rouge_l[first], other.rouge_l[second]),
        spearman(one.cross_entropy[first], other.cross_entropy[second]),
        partial(alike, spearman(places[0], length), spearman(places[1], length)),
        float((parts[0] == parts[1]).mean()),
        float((last[0] & last[1]).sum() / last[0].sum()),
    )


def difficulty_lines(found: Sequence[Seen], subsets: int) -> list[str]:
    """Two tables, of each student and of each pair, and what to think of them."""
    rows = [
        [
            "student",
            "samples",
            "ROUGE-L",
            "quartiles",
            "tied",
            "cross-entropy",
            "quartiles",
            "longer is harder",
        ]
    ]
    lengths = {one.name: spearman(np.arange(len(one.ids)), one.tokens) for one in found}
    for one in found:
        rows.append(
            [
                one.name,
                str(len(one.ids)),
                _spread(one.rouge_l),
                _quartiles(one.rouge_l),
                f"{tied_fraction(one.rouge_l):.0%}",
                _spread(one.cross_entropy),
                _quartiles(one.cross_entropy),
                f"{lengths[one.name]:+.2f}",
            ]
        )
    lines = align_columns(rows, numbers=True)
    pairs = [
        [
            "pair",
            "samples",
            "order",
            "ROUGE-L",
            "cross-entropy",
            "order at one length",
            "same subset",
            "hardest subset",
        ]
    ]
    for one, other in itertools.combinations(found, 2):
        pair = compare_pair(one, other, subsets)
        pairs.append(
            [
                f"{one.name}, {other.name}",
                str(pair.samples),
                *(
                    f"{value:+.2f}"
                    for value in (
                        pair.difficulty,
                        pair.rouge_l,
                        pair.cross_entropy,
                        pair.without_length,
                    )
                ),
                f"{pair.same_subset:.0%}",
                f"{pair.hardest:.0%}",
            ]
        )
    if len(pairs) > 1:
        lines += [
            "",
            "rank correlation (Spearman), and samples that both put into the same of "
            f"{subsets} subsets (by chance {1 / subsets:.0%}):",
            *align_columns(pairs, numbers=True),
        ]
    for name, value in lengths.items():
        if abs(value) >= SHARP:
            lines.append(
                f"{name}: its order is largely one of lengths ({value:+.2f} with the response's "
                f"tokens)"
            )
    return lines


def _subset_of(places: Floats, subsets: int) -> NDArray[np.int64]:
    """The subset, from 0, of each place in an order."""
    return np.searchsorted(subset_stops(len(places), subsets), places, side="right")


def _spread(values: Floats) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}"


def _quartiles(values: Floats) -> str:
    return " ".join(f"{value:.2f}" for value in np.quantile(values, [0.25, 0.5, 0.75]))
