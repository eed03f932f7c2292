"""Difficulty for several students: do they agree on which samples are hard, and is a hard sample
only a long one?

The paper orders the samples for one student (docs/method.md, eq. 3). Whether
another student can reuse a ranking depends on how far their rankings agree: by spread, rank
correlation, overlap of subsets, and length.
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
LENGTH_CORRELATION = 0.5  # from which a ranking is reported as one by length


@dataclass(frozen=True)
class RankedSamples:
    """A run's training samples from easy to hard. Arrays: [samples], in that order."""

    name: str
    ids: NDArray[np.bytes_]
    rouge_l: Floats
    cross_entropy: Floats
    tokens: NDArray[np.int64]  # of the reference response


def read_ranked_samples(run: RunDirectory, name: str) -> RankedSamples:
    """Read the result of the step `rank`. Raises ArtifactError if it has not run, or ranked without
    scores.
    """
    manifest = read_manifest(run.ranking)
    if manifest is None:
        raise ArtifactError(f"{run.path} has no ranking: run `pocl run --until rank` there first")
    table = pq.read_table(run.ranking / "ranking.parquet")
    if "rouge_l" not in table.column_names:
        raise ArtifactError(
            f"{run.path} is ranked by {manifest.info['strategy']}, without scores: choose runs "
            "that were scored"
        )
    split, order = TokenizedSplit.open(run.data, "train"), np.load(run.ranking / "order.npy")
    return RankedSamples(
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


def spearman(x: Floats | NDArray[np.int64], y: Floats | NDArray[np.int64]) -> float:
    """Spearman's rank correlation, -1 to 1, with tied values at their mean rank.

    NaN if there are fewer than two values, or one side is constant.
    """
    from scipy import stats

    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def partial_correlation(xy: float, xz: float, yz: float) -> float:
    """First-order partial correlation of x and y given z, from their pairwise correlations; NaN if
    z determines x or y.
    """
    variance = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / variance**0.5 if variance > 0 else float("nan")


@dataclass(frozen=True)
class Agreement:
    """How far two students agree on the samples that both have ranked."""

    samples: int
    difficulty: float  # Spearman correlation of the positions in the rankings
    rouge_l: float
    cross_entropy: float
    given_length: float  # partial correlation of the positions given the length
    same_subset: float  # share of samples in the same subset of both
    hardest_subset: float  # share of the hardest subset that both have in common


def measure_agreement(a: RankedSamples, b: RankedSamples, subsets: int) -> Agreement:
    """Compare two rankings on their common samples, which are divided into subsets again. Raises
    ArtifactError if there are fewer common samples than subsets.
    """
    common, rows_a, rows_b = np.intersect1d(a.ids, b.ids, assume_unique=True, return_indices=True)
    if len(common) < max(subsets, 2):
        raise ArtifactError(
            f"{a.name} and {b.name} have {len(common)} samples in common: compare runs on the same "
            "data"
        )
    # Positions and subsets among the common samples.
    positions_a, positions_b = ranks(rows_a), ranks(rows_b)
    subset_a, subset_b = (_subset_of(p, subsets) for p in (positions_a, positions_b))
    hardest_a, hardest_b = subset_a == subsets - 1, subset_b == subsets - 1
    length = a.tokens[rows_a]
    correlation = spearman(positions_a, positions_b)
    return Agreement(
        samples=len(common),
        difficulty=correlation,
        rouge_l=spearman(a.rouge_l[rows_a], b.rouge_l[rows_b]),
        cross_entropy=spearman(a.cross_entropy[rows_a], b.cross_entropy[rows_b]),
        given_length=partial_correlation(
            correlation, spearman(positions_a, length), spearman(positions_b, length)
        ),
        same_subset=float((subset_a == subset_b).mean()),
        hardest_subset=float((hardest_a & hardest_b).sum() / hardest_a.sum()),
    )


def difficulty_lines(students: Sequence[RankedSamples], subsets: int) -> list[str]:
    """A table of the students, a table of their pairs, and a note on rankings by length."""
    # The rows of the students. Samples are sorted by difficulty, so their index is their position.
    length_correlations = {
        student.name: spearman(np.arange(len(student.ids)), student.tokens) for student in students
    }
    header = ["student", "samples", "ROUGE-L", "quartiles", "tied"]
    rows = [[*header, "cross-entropy", "quartiles", "longer is harder"]]
    for student in students:
        rows.append(
            [
                student.name,
                str(len(student.ids)),
                _mean_and_deviation(student.rouge_l),
                _quartiles(student.rouge_l),
                f"{tied_fraction(student.rouge_l):.0%}",
                _mean_and_deviation(student.cross_entropy),
                _quartiles(student.cross_entropy),
                f"{length_correlations[student.name]:+.2f}",
            ]
        )

    # The tables, and a note on rankings by length.
    return [
        *align_columns(rows, numbers=True),
        *_agreement_lines(students, subsets),
        *(
            f"{name}: its ranking is largely by length ({value:+.2f} with the response's tokens)"
            for name, value in length_correlations.items()
            if abs(value) >= LENGTH_CORRELATION
        ),
    ]


def _agreement_lines(students: Sequence[RankedSamples], subsets: int) -> list[str]:
    """A table of every pair of students; empty for one student."""
    header = ["pair", "samples", "ranking", "ROUGE-L", "cross-entropy"]
    # One row for each pair.
    rows = [[*header, "ranking at equal length", "same subset", "hardest subset"]]
    for a, b in itertools.combinations(students, 2):
        agreement = measure_agreement(a, b, subsets)
        correlations = (
            agreement.difficulty,
            agreement.rouge_l,
            agreement.cross_entropy,
            agreement.given_length,
        )
        rows.append(
            [
                f"{a.name}, {b.name}",
                str(agreement.samples),
                *(f"{value:+.2f}" for value in correlations),
                f"{agreement.same_subset:.0%}",
                f"{agreement.hardest_subset:.0%}",
            ]
        )
    if len(rows) == 1:  # a header without pairs
        return []
    return [
        "",
        f"rank correlation (Spearman), and samples in the same of {subsets} subsets (by chance "
        f"{1 / subsets:.0%}):",
        *align_columns(rows, numbers=True),
    ]


def _subset_of(positions: Floats, subsets: int) -> NDArray[np.int64]:
    """The subset, from 0, of each position in a ranking."""
    return np.searchsorted(subset_stops(len(positions), subsets), positions, side="right")


def _mean_and_deviation(values: Floats) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}"


def _quartiles(values: Floats) -> str:
    return " ".join(f"{value:.2f}" for value in np.quantile(values, [0.25, 0.5, 0.75]))
