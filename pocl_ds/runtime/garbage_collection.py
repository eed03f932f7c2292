"""Python's garbage collection during a long loop."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def ignore_present_objects() -> Iterator[None]:
    """Exempt the objects that exist at the start from garbage collection until the end.

    Those of the imported packages and the models are some hundred thousand. A full collection that
    visits them takes 0.2 s, at a moment that differs from rank to rank, and the other ranks wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
