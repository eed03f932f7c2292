"""From scores to an order, easiest first (METHOD 1.4): ranks of two metrics, fused.

Everything is vectorised; ids are compared only where both metrics tie. The order is a function of
ids and scores: neither the order of files nor the number of shards enters it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.config import RankingConfig
from pocl_ds.config.registry import METRICS
from pocl_ds.data.tokenized import EncodedSplit
from pocl_ds.errors import ArtifactError, DataError, RecipeError
from pocl_ds.workflow.run_dir import (
    Manifest,
    RunDirectory,
    atomic_write,
    save_array,
    whole_result,
    write_manifest,
)

log = logging.getLogger("pocl_ds")

DEGENERATE = 1 / 3  # share of tied values above which a metric's ranks say little
LINES = 100_000  # of a score file, joined at a time

Ids: TypeAlias = "Sequence[str] | NDArray[np.bytes_]"


@dataclass(frozen=True)
class Scored:
    """What a strategy orders by, in the order of the input."""

    ids: Ids
    rouge_l: NDArray[np.float64]
    cross_entropy: NDArray[np.float64]
    by_rouge_l: NDArray[np.int64]  # indices, easiest first
    by_cross_entropy: NDArray[np.int64]
    rrf: NDArray[np.float64]  # larger is easier
    seed: int
    metrics: Mapping[str, NDArray[np.float64]]  # of `score.METRICS`, by name


class Ranking:
    """An order of samples and how it came about. Arrays are in the order of the input."""

    def __init__(
        self,
        ids: Ids,
        order_index: NDArray[np.int64],
        rank_rouge_l: NDArray[np.int64],
        rank_cross_entropy: NDArray[np.int64],
        scores: NDArray[np.float64],
    ) -> None:
        self.ids, self.order_index, self.scores = ids, order_index, scores
        self.rank_rouge_l, self.rank_cross_entropy = rank_rouge_l, rank_cross_entropy

    @cached_property
    def order(self) -> list[str]:
        """Ids, easiest first."""
        return [_text(self.ids[i]) for i in self.order_index]

    @cached_property
    def rrf(self) -> dict[str, float]:
        """Reciprocal rank fusion by id; larger is easier."""
        return {
            _text(name): score for name, score in zip(self.ids, self.scores.tolist(), strict=True)
        }


def fuse(
    ids: Ids,
    rouge_l: Sequence[float] | NDArray[np.float64],
    cross_entropy: Sequence[float] | NDArray[np.float64],
    *,
    k: float = 60,
    strategy: str = "fusion",
    reverse: bool = False,
    seed: int = 0,
    metrics: Mapping[str, NDArray[np.float64]] | None = None,
) -> Ranking:
    """Order samples from easy to hard.

    Ranks start at 1: by rouge_l descending and by cross_entropy ascending, equal values by the
    other metric, then by id. rrf = 1 / (k + rank_rouge_l) + 1 / (k + rank_cross_entropy) (Cormack
    et al. 2009); equal rrf by rank_rouge_l, which is unique. `random` orders by a hash of id and
    seed. The name of one of `metrics` orders by it: small is easy, equal values by cross_entropy,
    then by id. reverse gives hard to easy. Raises DataError where ids repeat, lengths differ or a
    score is not finite; RecipeError for an unknown strategy or k <= 0.
    """
    if not k > 0:
        raise RecipeError(
            f"ranking.k={k}: the constant of reciprocal rank fusion must be greater than 0, as 60"
        )
    metrics = metrics or {}
    if strategy not in STRATEGIES and strategy not in metrics:
        raise RecipeError(
            f"ranking.strategy={strategy!r}: take one of {', '.join([*STRATEGIES, *metrics])}"
        )
    rouge, entropy = np.asarray(rouge_l, np.float64), np.asarray(cross_entropy, np.float64)
    _check(ids, rouge, entropy)
    by_rouge, by_entropy = _sorted(ids, -rouge, entropy), _sorted(ids, entropy, -rouge)
    rank_rouge, rank_entropy = _ranks(by_rouge), _ranks(by_entropy)
    scores = 1 / (k + rank_rouge) + 1 / (k + rank_entropy)
    scored = Scored(ids, rouge, entropy, by_rouge, by_entropy, scores, seed, metrics)
    ordered = (
        _sorted(ids, metrics[strategy], entropy)
        if strategy in metrics
        else STRATEGIES[strategy](scored)
    )
    order = np.asarray(ordered).astype(np.int64, copy=False)
    if (
        strategy in STRATEGIES
        and strategy not in OWN
        and sorted(order.tolist()) != list(range(len(ids)))
    ):
        raise RecipeError(
            f"ranking.strategy={strategy} of a plugin does not name every sample once: mend its "
            f"function"
        )
    return Ranking(ids, order[::-1] if reverse else order, rank_rouge, rank_entropy, scores)


def random_order(ids: Ids, seed: int) -> NDArray[np.int64]:
    """Indices by a hash of id and seed: a shuffle that no file's order enters."""
    return _sorted(ids, hash_ids(ids, seed), np.zeros(len(ids), np.uint8)).astype(
        np.int64, copy=False
    )


def tied_share(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Share of values that another value equals, 0 to 1."""
    ordered = np.sort(np.asarray(values, np.float64))
    if len(ordered) < 2:
        return 0.0
    same = ordered[1:] == ordered[:-1]
    return float((np.append(same, False) | np.append(False, same)).mean())


def hash_ids(ids: Ids, seed: int) -> NDArray[np.uint64]:
    """64 bits an id, from its UTF-8 bytes and the seed alone (FNV-1a, then splitmix64)."""
    table = _as_bytes(ids)
    columns = np.ascontiguousarray(table).view(np.uint8).reshape(len(table), table.itemsize)
    with np.errstate(over="ignore"):
        state = np.full(len(table), np.uint64(0xCBF29CE484222325) ^ np.uint64(seed), np.uint64)
        for column in columns.T:  # numpy pads short ids with zeros, which no id contains
            state = np.where(column == 0, state, (state ^ column) * np.uint64(0x100000001B3))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def rank(run: RunDirectory, config: RankingConfig, *, seed: int, fingerprint: str) -> Manifest:
    """The stage `rank`: score shards -> ranking/ranking.parquet and ranking/order.npy, joined by
    sample id.
    """
    if manifest := whole_result(run.ranking, fingerprint):
        return manifest
    start, split = time.monotonic(), EncodedSplit.open(run.data, "train")
    if config.strategy == "random":  # needs no scores, so there are none
        order = random_order(split.ids, seed)
        order = order[::-1] if config.reverse else order
        log.info("ordered %d samples at random", len(order))
        return _write(
            run,
            order,
            split,
            {},
            {"strategy": "random", "seconds": time.monotonic() - start},
            fingerprint,
        )
    names = [config.strategy] if config.strategy in METRICS else []
    rouge, entropy, *others = _join(run, split, names)
    metrics = dict(zip(names, others, strict=True))
    shares = {"rouge_l": tied_share(rouge), "cross_entropy": tied_share(entropy)}
    for metric, tied in shares.items():
        if tied > DEGENERATE:
            log.warning(
                "%s is degenerate: %.0f%% of its values are tied, so its ranks say little",
                metric,
                100 * tied,
            )
    ranking = fuse(
        split.ids,
        rouge,
        entropy,
        k=config.k,
        strategy=config.strategy,
        reverse=config.reverse,
        seed=seed,
        metrics=metrics,
    )
    order = ranking.order_index
    columns = {
        "rouge_l": rouge,
        "cross_entropy": entropy,
        "rank_rouge_l": ranking.rank_rouge_l,
        "rank_cross_entropy": ranking.rank_cross_entropy,
        "rrf": ranking.scores,
        **metrics,
    }
    info = {
        "strategy": config.strategy,
        "reverse": config.reverse,
        "tied_share": shares,
        "mean_rouge_l": float(rouge.mean()),
        "mean_cross_entropy": float(entropy.mean()),
    }
    log.info(
        "ranked %d samples by %s: mean ROUGE-L %.4f, mean cross-entropy %.4f",
        len(order),
        config.strategy,
        info["mean_rouge_l"],
        info["mean_cross_entropy"],
    )
    info["seconds"] = time.monotonic() - start
    return _write(run, order, split, columns, info, fingerprint)


def _write(
    run: RunDirectory,
    order: NDArray[np.int64],
    split: EncodedSplit,
    columns: dict[str, NDArray[Any]],
    info: dict[str, Any],
    fingerprint: str,
) -> Manifest:
    """The order, a table in that order, and the manifest. columns: in the rows of data/train."""
    ids = pa.array(np.asarray(split.ids)[order], pa.binary()).cast(pa.string())
    with atomic_write(run.ranking / "ranking.parquet", "wb") as stream:
        pq.write_table(
            pa.table({"id": ids, **{name: values[order] for name, values in columns.items()}}),
            stream,
        )
    with atomic_write(run.ranking / "order.npy", "wb") as stream:
        save_array(stream, order)
    return write_manifest(run.ranking, "rank", fingerprint, info={"samples": len(order), **info})


def _join(
    run: RunDirectory, split: EncodedSplit, names: Sequence[str]
) -> list[NDArray[np.float64]]:
    """ROUGE-L, cross-entropy and the named metrics, in the rows of data/train. Every sample must be
    scored exactly once.
    """
    found = [np.full(len(split), np.nan) for _ in range(2 + len(names))]
    seen = np.zeros(len(split), bool)
    for path in _shard_files(run.scores):
        for ids, values in _records(path, names):
            rows = split.rows_of(ids)
            twice = seen[rows]
            twice[np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])] = True
            if twice.any():
                name = ids[int(np.argmax(twice))]
                raise ArtifactError(
                    f"{path} scores a sample a second time ({name}): remove {run.scores} and "
                    f"score again"
                )
            seen[rows] = True
            for column, part in zip(found, values.T, strict=True):
                column[rows] = part
    if not seen.all():
        missing = _text(split.ids[int(np.argmin(seen))])
        raise ArtifactError(
            f"sample {missing} has no score ({int((~seen).sum())} of {len(split)} lack one): run "
            f"`pocl score`"
        )
    return found


def _shard_files(scores: Path) -> list[Path]:
    """The sealed shards of one complete set."""
    sealed = sorted(
        path
        for path in scores.glob("shard-*-of-*.jsonl")
        if path.with_name(path.name + ".manifest.json").is_file()
    )
    if not sealed:
        raise ArtifactError(f"there are no finished scores in {scores}: run `pocl score`")
    counts = sorted({int(path.stem.rpartition("-")[2]) for path in sealed})
    missing = []
    for (
        count
    ) in counts:  # scores cut into another number of shards say the same: any whole set will do
        expected = [scores / f"shard-{i:05d}-of-{count:05d}.jsonl" for i in range(count)]
        absent = [path for path in expected if path not in sealed]
        if not absent:
            return expected
        missing += absent[:1]
    raise ArtifactError(
        f"{missing[0]} is missing or unfinished: run `pocl score`, it repeats only unfinished "
        f"shards"
    )


def _records(path: Path, names: Sequence[str]) -> Iterator[tuple[list[str], NDArray[np.float64]]]:
    """Ids and [n, 2 + names] scores of a shard, some lines at a time; responses are not held."""
    ids: list[str] = []
    values: list[list[float]] = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
                more = [float(record["metrics"][name]) for name in names]
                values.append([float(record["rouge_l"]), float(record["cross_entropy"]), *more])
                ids.append(record["id"])
            except (ValueError, TypeError, KeyError) as error:
                raise ArtifactError(
                    f"{path} line {number} is damaged ({error!r}): remove the shard and score again"
                ) from None
            if len(ids) == LINES:
                yield ids, np.array(values, np.float64)
                ids, values = [], []
    if ids:
        yield ids, np.array(values, np.float64)


def _check(ids: Ids, rouge: NDArray[np.float64], entropy: NDArray[np.float64]) -> None:
    if not len(ids) == len(rouge) == len(entropy):
        raise DataError(
            f"{len(ids)} ids, {len(rouge)} values of rouge_l and {len(entropy)} of cross_entropy: "
            f"give one each"
        )
    for name, values in (("rouge_l", rouge), ("cross_entropy", entropy)):
        if not np.isfinite(values).all():
            worst = int(np.argmin(np.isfinite(values)))
            raise DataError(
                f"sample {_text(ids[worst])} has {name}={values[worst]}: score it again, or leave "
                f"it out"
            )
    twice = _repeated(ids)
    if twice is not None:
        raise DataError(f"sample id {twice} stands there more than once: ids must be unique")


def _repeated(ids: Ids) -> str | None:
    """The first id that stands there a second time. Hashes are compared first, ids only where
    hashes are equal.
    """
    hashes = hash_ids(ids, 0)
    ordered = np.sort(hashes)
    suspects = ordered[1:][ordered[1:] == ordered[:-1]]
    seen: set[str] = set()
    for i in np.flatnonzero(np.isin(hashes, suspects)) if len(suspects) else ():
        name = _text(ids[i])
        if name in seen:
            return name
        seen.add(name)
    return None


def _sorted(ids: Ids, primary: NDArray[Any], secondary: NDArray[Any]) -> NDArray[np.int64]:
    """Indices by primary, secondary, id, all ascending."""
    order = np.argsort(secondary, kind="stable")
    order = order[np.argsort(primary[order], kind="stable")]  # half the time of lexsort
    same = (primary[order][1:] == primary[order][:-1]) & (
        secondary[order][1:] == secondary[order][:-1]
    )
    if not same.any():
        return order
    starts = np.append(True, ~same)  # of runs of equal pairs
    slots = np.flatnonzero(np.append(same, False) | ~starts)
    members = order[slots]
    names = _as_bytes(
        [ids[i] for i in members] if isinstance(ids, list) else np.asarray(ids)[members]
    )
    order[slots] = members[
        np.lexsort((np.argsort(np.argsort(names, kind="stable")), np.cumsum(starts)[slots]))
    ]
    return order


def _ranks(order: NDArray[np.int64]) -> NDArray[np.int64]:
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def _as_bytes(ids: Ids) -> NDArray[np.bytes_]:
    """Ids as fixed-width UTF-8: their byte order is the order of code points."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "S":
        return ids
    encoded = [str(name).encode() for name in ids]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


STRATEGIES: dict[str, Callable[[Scored], NDArray[np.int64]]] = {
    "fusion": lambda scored: scored.by_rouge_l[
        np.argsort(-scored.rrf[scored.by_rouge_l], kind="stable")
    ],
    "rouge_l": lambda scored: scored.by_rouge_l,
    "cross_entropy": lambda scored: scored.by_cross_entropy,
    "random": lambda scored: random_order(scored.ids, scored.seed),
}
OWN = tuple(STRATEGIES)  # whose orders are known to be permutations
