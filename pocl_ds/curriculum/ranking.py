"""The difficulty ranking: from two scores of each sample to an order, easiest first.

Everything is vectorized; ids are compared only where both scores tie. The order is a function of
ids and scores alone, not of the order of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import DataError, RecipeError
from pocl_ds.runtime.hashing import splitmix64

SampleIds: TypeAlias = "Sequence[str] | NDArray[np.bytes_]"
Scores: TypeAlias = "Sequence[float] | NDArray[np.float64]"


@dataclass(frozen=True)
class DifficultyScores:
    """What a ranking strategy orders by. Arrays are [samples], in the order of the input."""

    ids: SampleIds
    rouge_l: NDArray[np.float64]
    cross_entropy: NDArray[np.float64]
    by_rouge_l: NDArray[np.int64]  # rows, easiest first
    by_cross_entropy: NDArray[np.int64]  # rows, easiest first
    rrf: NDArray[np.float64]  # reciprocal rank fusion, larger is easier
    seed: int
    metrics: Mapping[str, NDArray[np.float64]]  # registered by plugins, by name


@dataclass(frozen=True)
class DifficultyRanking:
    """An order of samples, and the ranks it comes from. Arrays are [samples].

    All arrays but `order` are in the order of the input.
    """

    ids: SampleIds
    order: NDArray[np.int64]  # rows of the input, easiest first
    rank_rouge_l: NDArray[np.int64]  # from 1, rank 1 is the easiest
    rank_cross_entropy: NDArray[np.int64]
    rrf: NDArray[np.float64]  # reciprocal rank fusion, larger is easier

    @property
    def ordered_ids(self) -> list[str]:
        """Sample ids, easiest first."""
        return [id_as_text(self.ids[row]) for row in self.order]


def rank_by_difficulty(
    rouge_l: Scores,
    cross_entropy: Scores,
    ids: SampleIds | None = None,
    *,
    strategy: str = "fusion",
    k: float = 60,
    reverse: bool = False,
    seed: int = 0,
    metrics: Mapping[str, NDArray[np.float64]] | None = None,
) -> DifficultyRanking:
    """Order samples from easy to hard by reciprocal rank fusion of two scores.

    Samples are ranked by rouge_l descending and by cross_entropy ascending, from rank 1. Equal
    values are ordered by the other score, then by id. `fusion` orders by the sum of both reciprocal
    ranks (docs/method.md, eq. 3; Cormack et al. 2009; POCL, arXiv 2506.05695), equal sums by the
    rank of rouge_l.

    Args:
        rouge_l: ROUGE-L of the student's response, 0 to 1, [samples].
        cross_entropy: the student's cross-entropy of the reference in nats per token, [samples].
        ids: unique sample ids; None numbers the samples.
        strategy: `fusion`, `rouge_l`, `cross_entropy`, `random` (by a hash of id and seed), a
            strategy of a plugin, or the name of one of `metrics`, of which small values are easy.
        k: constant of the fusion, greater than 0.
        reverse: order from hard to easy.
        seed: of the strategy `random`.
        metrics: further scores by name, each [samples].

    Raises:
        DataError: ids repeat, lengths differ, or a score is not finite.
        RecipeError: the strategy is unknown, k <= 0, or a plugin's strategy returns no permutation.
    """
    if not k > 0:
        raise RecipeError(
            f"ranking.k={k}: the constant of reciprocal rank fusion must be greater than 0, as 60"
        )
    metrics = metrics or {}
    if strategy not in STRATEGIES and strategy not in metrics:
        choices = ", ".join([*STRATEGIES, *metrics])
        raise RecipeError(f"ranking.strategy={strategy!r}: use one of {choices}")

    # Rank by each score, and fuse the ranks.
    rouge, entropy = np.asarray(rouge_l, np.float64), np.asarray(cross_entropy, np.float64)
    if ids is None:
        ids = np.char.mod("%010d", np.arange(len(rouge))).astype("S")
    _validate(ids, rouge, entropy)
    by_rouge, by_entropy = _sorted_rows(ids, -rouge, entropy), _sorted_rows(ids, entropy, -rouge)
    rank_rouge, rank_entropy = _ranks(by_rouge), _ranks(by_entropy)
    rrf = 1 / (k + rank_rouge) + 1 / (k + rank_entropy)

    scores = DifficultyScores(ids, rouge, entropy, by_rouge, by_entropy, rrf, seed, metrics)
    order = _order_by_strategy(scores, strategy)
    order = order[::-1] if reverse else order
    return DifficultyRanking(ids, order, rank_rouge, rank_entropy, rrf)


def _order_by_strategy(scores: DifficultyScores, strategy: str) -> NDArray[np.int64]:
    """Rows, easiest first. Raises RecipeError if a plugin's strategy returns no permutation."""
    if strategy in scores.metrics:
        rows = _sorted_rows(scores.ids, scores.metrics[strategy], scores.cross_entropy)
    else:
        rows = STRATEGIES[strategy](scores)
    order = np.asarray(rows).astype(np.int64, copy=False)
    from_plugin = strategy in STRATEGIES and strategy not in BUILT_IN_STRATEGIES
    if from_plugin and sorted(order.tolist()) != list(range(len(scores.ids))):
        raise RecipeError(
            f"ranking.strategy={strategy} of a plugin does not name every sample once: fix its "
            "function"
        )
    return order


def random_order(ids: SampleIds, seed: int) -> NDArray[np.int64]:
    """Rows in the order of a hash of id and seed: a shuffle that ignores the order of the input."""
    rows = _sorted_rows(ids, hash_ids(ids, seed), np.zeros(len(ids), np.uint8))
    return rows.astype(np.int64, copy=False)


def tied_fraction(values: Scores) -> float:
    """Fraction of values that another value equals, 0 to 1."""
    ordered = np.sort(np.asarray(values, np.float64))
    if len(ordered) < 2:
        return 0.0
    equals_next = ordered[1:] == ordered[:-1]
    return float((np.append(equals_next, False) | np.append(False, equals_next)).mean())


def hash_ids(ids: SampleIds, seed: int) -> NDArray[np.uint64]:
    """64-bit hashes of ids, from their UTF-8 bytes and the seed: FNV-1a, then splitmix64."""
    table = _as_bytes(ids)
    columns = np.ascontiguousarray(table).view(np.uint8).reshape(len(table), table.itemsize)
    with np.errstate(over="ignore"):
        state = np.full(len(table), np.uint64(0xCBF29CE484222325) ^ np.uint64(seed), np.uint64)
        for column in columns.T:  # numpy pads short ids with zeros, which no id contains
            state = np.where(column == 0, state, (state ^ column) * np.uint64(0x100000001B3))
        return splitmix64(state)


def id_as_text(sample_id: Any) -> str:
    """A sample id as a string."""
    return sample_id.decode() if isinstance(sample_id, bytes) else str(sample_id)


def _validate(ids: SampleIds, rouge: NDArray[np.float64], entropy: NDArray[np.float64]) -> None:
    if not len(ids) == len(rouge) == len(entropy):
        raise DataError(
            f"{len(ids)} ids, {len(rouge)} values of rouge_l and {len(entropy)} of cross_entropy: "
            "give one each"
        )
    for name, values in (("rouge_l", rouge), ("cross_entropy", entropy)):
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.argmin(finite))
            raise DataError(
                f"sample {id_as_text(ids[row])} has {name}={values[row]}: score it again, or leave "
                "it out"
            )
    repeated = _find_repeated_id(ids)
    if repeated is not None:
        raise DataError(f"sample id {repeated} occurs more than once: ids must be unique")


def _find_repeated_id(ids: SampleIds) -> str | None:
    """The first id that occurs a second time. Only ids with equal hashes are compared."""
    hashes = hash_ids(ids, 0)
    ordered = np.sort(hashes)
    repeated_hashes = ordered[1:][ordered[1:] == ordered[:-1]]
    visited: set[str] = set()
    for row in np.flatnonzero(np.isin(hashes, repeated_hashes)) if len(repeated_hashes) else ():
        sample_id = id_as_text(ids[row])
        if sample_id in visited:
            return sample_id
        visited.add(sample_id)
    return None


def _sorted_rows(
    ids: SampleIds, primary: NDArray[Any], secondary: NDArray[Any]
) -> NDArray[np.int64]:
    """Rows by primary, secondary, id, all ascending."""
    # Two stable sorts take half the time of lexsort.
    order = np.argsort(secondary, kind="stable")
    order = order[np.argsort(primary[order], kind="stable")]
    ties = (primary[order][1:] == primary[order][:-1]) & (
        secondary[order][1:] == secondary[order][:-1]
    )
    if not ties.any():
        return order
    # Sort the rows of each run of equal pairs by id.
    run_starts = np.append(True, ~ties)
    places = np.flatnonzero(np.append(ties, False) | ~run_starts)
    rows = order[places]
    tied_ids = _as_bytes([ids[i] for i in rows] if isinstance(ids, list) else np.asarray(ids)[rows])
    id_ranks = np.argsort(np.argsort(tied_ids, kind="stable"))
    order[places] = rows[np.lexsort((id_ranks, np.cumsum(run_starts)[places]))]
    return order


def _ranks(order: NDArray[np.int64]) -> NDArray[np.int64]:
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def _as_bytes(ids: SampleIds) -> NDArray[np.bytes_]:
    """Ids as fixed-width UTF-8, whose byte order is the order of code points."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "S":
        return ids
    encoded = [str(name).encode() for name in ids]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def _by_fusion(scores: DifficultyScores) -> NDArray[np.int64]:
    by_rrf = np.argsort(-scores.rrf[scores.by_rouge_l], kind="stable")
    return scores.by_rouge_l[by_rrf]


# Ranking strategies by name; plugins register more. Each returns rows, easiest first.
STRATEGIES: dict[str, Callable[[DifficultyScores], NDArray[np.int64]]] = {
    "fusion": _by_fusion,
    "rouge_l": lambda scores: scores.by_rouge_l,
    "cross_entropy": lambda scores: scores.by_cross_entropy,
    "random": lambda scores: random_order(scores.ids, scores.seed),
}
BUILT_IN_STRATEGIES = tuple(STRATEGIES)
