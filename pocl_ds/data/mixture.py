"""Which samples of a source enter a mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def mixture_size(samples: int, weight: float, max_samples: int | None) -> int:
    """How many of `samples` a source contributes: round(weight * samples), at most max_samples."""
    size = round(weight * samples)
    return size if max_samples is None else min(size, max_samples)


def mixture_rows(
    ids: Iterable[str], weight: float, max_samples: int | None = None
) -> NDArray[np.int64]:
    """Ascending rows of the samples that a source contributes, those with the smallest hashes.

    weight: above 0, at most 1. The choice depends on the ids alone, and a smaller weight or maximum
    chooses a part of what a larger one chooses. Memory: 8 bytes per id.
    """
    hashes = np.fromiter(map(_hash, ids), dtype=np.uint64)
    size = mixture_size(len(hashes), weight, max_samples)
    return np.sort(np.argsort(hashes, kind="stable")[:size])


def _hash(sample_id: str) -> int:
    # The prefix makes this choice independent of others by the hash of the id (`select_by_hash`).
    return int.from_bytes(hashlib.sha256(b"mixture\0" + sample_id.encode()).digest()[:8], "big")
