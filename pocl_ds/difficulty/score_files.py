"""Scores that were made elsewhere: a Parquet file with one row for each training sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.config.registry import FILE_STRATEGY, METRICS
from pocl_ds.curriculum.ranking import id_as_text
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import DataError

log = logging.getLogger("pocl_ds")

ID_COLUMN = "id"


def read_score_file(
    path: Path, split: TokenizedSplit, names: Sequence[str]
) -> list[NDArray[np.float64]]:
    """The named columns in the rows of data/train, each [samples].

    Rows of other ids are ignored, with a warning. Raises DataError if the file cannot be read, a
    column is missing or no number, a value is not finite, or a sample has no row or two.
    """
    # Read the ids and the named columns.
    check_score_file(path, names)
    try:
        table = pq.read_table(path, columns=[ID_COLUMN, *names])
        texts = table[ID_COLUMN].cast(pa.string()).to_pylist()
        columns = [table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, names, error) from None

    # Find the row of each id.
    ids = np.asarray(split.ids)
    by_id = np.argsort(ids)
    encoded = np.array([str(text).encode() for text in texts] or [b""], "S")[: len(texts)]
    places = np.minimum(np.searchsorted(ids, encoded, sorter=by_id), len(ids) - 1)
    rows = by_id[places]
    known = ids[rows] == encoded
    if not known.all():
        log.warning(
            "rank: %d of %d rows of %s are of no training sample (the first is %s) and are ignored",
            (~known).sum(),
            len(known),
            path,
            texts[int(np.argmin(known))],
        )
    counts = np.bincount(rows[known], minlength=len(ids))
    if (counts != 1).any():
        row = int(np.argmax(counts != 1))
        problem = "no row" if counts[row] == 0 else f"{counts[row]} rows"
        raise DataError(
            f"sample {id_as_text(ids[row])} has {problem} in ranking.scores={path} "
            f"({int((counts == 0).sum())} of {len(ids)} samples have none): give each one row"
        )

    # Put the values into the order of the data.
    result = []
    for name, column in zip(names, columns, strict=True):
        values = np.empty(len(ids))
        values[rows[known]] = column[known]
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise DataError(
                f"sample {id_as_text(ids[row])} has {name}={values[row]} in ranking.scores={path}: "
                "give a finite number"
            )
        result.append(values)
    return result


def check_score_file(path: Path, names: Sequence[str]) -> None:
    """Raise DataError if the file cannot be read or lacks a column."""
    try:
        present = pq.read_schema(path).names
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, names, error) from None
    missing = [name for name in (ID_COLUMN, *names) if name not in present]
    if missing:
        raise DataError(
            f"ranking.scores={path} has no column {missing[0]!r}, only {', '.join(present)}: add "
            "it, or choose another ranking.strategy"
        )


def score_columns(strategy: str) -> list[str]:
    """The columns of a file that a ranking strategy reads."""
    if strategy == FILE_STRATEGY:
        return [FILE_STRATEGY]
    return ["rouge_l", "cross_entropy", *([strategy] if strategy in METRICS else [])]


def _unreadable(path: Path, names: Sequence[str], error: Exception) -> DataError:
    return DataError(
        f"ranking.scores={path} cannot be read ({str(error).splitlines()[0]}): give a Parquet file "
        f"with a column {ID_COLUMN!r} of text and numbers in {', '.join(names)}"
    )
