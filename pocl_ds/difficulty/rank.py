"""The step `rank`: joins the score shards by sample id and writes the difficulty ranking."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.config import RankingConfig
from pocl_ds.config.registry import FILE_STRATEGY, LENGTH_STRATEGY, METRICS
from pocl_ds.curriculum.ranking import id_as_text, random_order, rank_by_difficulty, tied_fraction
from pocl_ds.data.split_sources import read_split_sources
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.difficulty.score_files import read_score_file, score_columns
from pocl_ds.difficulty.ties import ZeroCounts, tie_warning
from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import atomic_write, save_array
from pocl_ds.workflow.manifest import Manifest, finished_manifest, read_part, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

LINES_PER_CHUNK = 100_000  # of a score file, joined together


def write_ranking(
    run: RunDirectory, config: RankingConfig, *, seed: int, fingerprint: str
) -> Manifest:
    """Write ranking/order.npy and ranking/ranking.parquet, if they are not there already.

    order.npy holds rows of data/train, easiest first; the table has the scores and ranks in that
    order, and the source of each sample of a mixture. Raises ArtifactError if scores are missing or
    damaged, DataError if one is not finite or `ranking.scores` is no such file.
    """
    if manifest := finished_manifest(run.ranking, fingerprint):
        return manifest
    start, split = time.monotonic(), TokenizedSplit.open(run.data, "train")

    # A random order needs no scores.
    if config.strategy == "random":
        order = random_order(split.ids, seed)
        order = order[::-1] if config.reverse else order
        log.info("ordered %d samples at random", len(order))
        info = {"strategy": "random", "seconds": time.monotonic() - start}
        return _write_files(run, order, split, {}, info, fingerprint)

    # The length, and a file's own measure of difficulty, are ranked alone.
    score_file = None if config.scores is None else Path(config.scores).expanduser()
    if config.strategy == LENGTH_STRATEGY:
        return _rank_by_one(run, split, config, split.loss_tokens, fingerprint)
    if score_file is not None and config.strategy == FILE_STRATEGY:
        (difficulty,) = read_score_file(score_file, split, score_columns(FILE_STRATEGY))
        return _rank_by_one(run, split, config, difficulty, fingerprint)
    return _rank_by_scores(run, split, config, score_file, seed, fingerprint)


def _rank_by_scores(
    run: RunDirectory,
    split: TokenizedSplit,
    config: RankingConfig,
    score_file: Path | None,
    seed: int,
    fingerprint: str,
) -> Manifest:
    """Order by ROUGE-L, cross-entropy and a metric. score_file: in place of the step `score`."""
    # Join the scores, and warn about a metric with many equal values.
    start = time.monotonic()
    metric_names = [config.strategy] if config.strategy in METRICS else []
    if score_file is not None:
        names = score_columns(config.strategy)
        rouge_l, cross_entropy, *values = read_score_file(score_file, split, names)
    else:
        rouge_l, cross_entropy, *values = _join_scores(run, split, metric_names)
    metrics = dict(zip(metric_names, values, strict=True))
    tied_fractions = {
        "rouge_l": tied_fraction(rouge_l),
        "cross_entropy": tied_fraction(cross_entropy),
    }
    # A file does not say how its ROUGE-L was computed.
    rouge_tokenizer, zeros = _read_score_info(run) if score_file is None else ("", ZeroCounts())
    for name, fraction in tied_fractions.items():
        if message := tie_warning(name, fraction, len(split), zeros, rouge_tokenizer):
            log.warning("rank: %s", message)

    ranking = rank_by_difficulty(
        rouge_l,
        cross_entropy,
        split.ids,
        strategy=config.strategy,
        k=config.k,
        reverse=config.reverse,
        seed=seed,
        metrics=metrics,
    )
    columns: dict[str, NDArray[Any]] = {
        "rouge_l": rouge_l,
        "cross_entropy": cross_entropy,
        "rank_rouge_l": ranking.rank_rouge_l,
        "rank_cross_entropy": ranking.rank_cross_entropy,
        "rrf": ranking.rrf,
        **metrics,
    }
    info = {
        "strategy": config.strategy,
        "reverse": config.reverse,
        "tied_fraction": tied_fractions,
        **({"scores": str(score_file)} if score_file else {"rouge_tokenizer": rouge_tokenizer}),
        "mean_rouge_l": float(rouge_l.mean()),
        "mean_cross_entropy": float(cross_entropy.mean()),
    }
    means = info["mean_rouge_l"], info["mean_cross_entropy"]
    message = "ranked %d samples by %s: mean ROUGE-L %.4f, mean cross-entropy %.4f"
    log.info(message, len(split), config.strategy, *means)
    info["seconds"] = time.monotonic() - start
    return _write_files(run, ranking.order, split, columns, info, fingerprint)


def _rank_by_one(
    run: RunDirectory,
    split: TokenizedSplit,
    config: RankingConfig,
    difficulty: NDArray[Any],
    fingerprint: str,
) -> Manifest:
    """Order by one measure of difficulty, [samples] by row of data/train; small is easy."""
    start, unknown = time.monotonic(), np.zeros(len(split))
    metrics = {config.strategy: difficulty.astype(np.float64)}
    ranking = rank_by_difficulty(
        unknown,
        unknown,
        split.ids,
        strategy=config.strategy,
        reverse=config.reverse,
        metrics=metrics,
    )
    source = f" in {config.scores}" if config.scores else ""
    log.info("ranked %d samples by the %s%s", len(split), config.strategy, source)
    info = {
        "strategy": config.strategy,
        "reverse": config.reverse,
        "scores": config.scores,
        "tied_fraction": {config.strategy: tied_fraction(difficulty)},
        "seconds": time.monotonic() - start,
    }
    return _write_files(run, ranking.order, split, metrics, info, fingerprint)


def _write_files(
    run: RunDirectory,
    order: NDArray[np.int64],
    split: TokenizedSplit,
    columns: dict[str, NDArray[Any]],
    info: dict[str, Any],
    fingerprint: str,
) -> Manifest:
    """Write the order, a table in that order, and the manifest. columns: by row of data/train."""
    ids = pa.array(np.asarray(split.ids)[order], pa.binary()).cast(pa.string())
    table = pa.table({"id": ids, **{name: values[order] for name, values in columns.items()}})
    if sources := read_split_sources(run.data, "train"):
        numbers = sources.numbers[order]
        names = pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), list(sources.names))
        table = table.append_column("source", names)
        info["sources"] = _places_of_sources(numbers, sources.names)
    with atomic_write(run.ranking / "ranking.parquet", "wb") as stream:
        pq.write_table(table, stream)
    with atomic_write(run.ranking / "order.npy", "wb") as stream:
        save_array(stream, order)
    return write_manifest(run.ranking, "rank", fingerprint, info={"samples": len(order), **info})


def _places_of_sources(
    numbers: NDArray[np.uint16], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Samples and mean place of each source of a mixture, from 0 (easiest) to 1 (hardest).

    numbers: the source of each sample in the order of the ranking, [samples].
    """
    places = np.linspace(0, 1, len(numbers))
    summary: dict[str, dict[str, float]] = {}
    for number, name in enumerate(names):
        own = places[numbers == number]
        if len(own):
            summary[name] = {"samples": len(own), "mean_place": float(own.mean())}
            log.info(
                "rank: %d samples of source %s, at place %.2f on average (0: easiest, 1: hardest)",
                len(own),
                name,
                own.mean(),
            )
    return summary


def _join_scores(
    run: RunDirectory, split: TokenizedSplit, metric_names: Sequence[str]
) -> list[NDArray[np.float64]]:
    """ROUGE-L, cross-entropy and the named metrics in the rows of data/train, each [samples].

    Raises ArtifactError if a sample has no score, or more than one.
    """
    columns = [np.full(len(split), np.nan) for _ in range(2 + len(metric_names))]
    scored = np.zeros(len(split), bool)
    for path in _complete_shards(run.scores):
        for ids, values in _read_scores(path, metric_names):
            rows = split.rows_of(ids)
            # A row that was scored before, or that occurs again within this chunk.
            repeated = scored[rows]
            repeated[np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])] = (
                True
            )
            if repeated.any():
                raise ArtifactError(
                    f"{path} scores a sample a second time ({ids[int(np.argmax(repeated))]}): "
                    f"remove {run.scores} and score again"
                )
            scored[rows] = True
            for column, scores in zip(columns, values.T, strict=True):
                column[rows] = scores
    if not scored.all():
        missing = id_as_text(split.ids[int(np.argmin(scored))])
        raise ArtifactError(
            f"sample {missing} has no score ({int((~scored).sum())} of {len(split)} lack one): run "
            "`pocl score`"
        )
    return columns


def _read_score_info(run: RunDirectory) -> tuple[str, ZeroCounts]:
    """The tokenizer of ROUGE-L, and why values are 0, from the manifests of the scores."""
    rouge_tokenizer, zeros = "", ZeroCounts()
    for path in _complete_shards(run.scores):
        manifest = read_part(run.scores, f"{path.name}.manifest.json")
        assert manifest is not None  # of a complete shard
        rouge_tokenizer = manifest.info["rouge_tokenizer"]
        zeros += ZeroCounts.from_info(manifest.info)
    return rouge_tokenizer, zeros


def _complete_shards(scores: Path) -> list[Path]:
    """The score files of one complete division into shards.

    Divisions into different numbers of shards give equal scores, so any complete one will do.
    """
    finished = sorted(
        path
        for path in scores.glob("shard-*-of-*.jsonl")
        if read_part(scores, f"{path.name}.manifest.json") is not None
    )
    if not finished:
        raise ArtifactError(
            f"there are no finished and undamaged scores in {scores}: run `pocl score`"
        )
    missing = []
    for shards in sorted({int(path.stem.rpartition("-")[2]) for path in finished}):
        paths = [scores / f"shard-{shard:05d}-of-{shards:05d}.jsonl" for shard in range(shards)]
        unfinished = [path for path in paths if path not in finished]
        if not unfinished:
            return paths
        missing += unfinished[:1]
    raise ArtifactError(
        f"{missing[0]} is missing, unfinished or damaged: run `pocl score`, which repeats "
        "only such shards"
    )


def _read_scores(
    path: Path, metric_names: Sequence[str]
) -> Iterator[tuple[list[str], NDArray[np.float64]]]:
    """Ids, and scores [n, 2 + metrics], of LINES_PER_CHUNK lines of a shard at a time."""
    ids: list[str] = []
    values: list[list[float]] = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
                metrics = [float(record["metrics"][name]) for name in metric_names]
                values.append([float(record["rouge_l"]), float(record["cross_entropy"]), *metrics])
                ids.append(record["id"])
            except (ValueError, TypeError, KeyError) as error:
                raise ArtifactError(
                    f"{path} line {number} is damaged ({error!r}): remove the shard and score again"
                ) from None
            if len(ids) == LINES_PER_CHUNK:
                yield ids, np.array(values, np.float64)
                ids, values = [], []
    if ids:
        yield ids, np.array(values, np.float64)
