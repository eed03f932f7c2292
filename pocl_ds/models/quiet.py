"""Keeps transformers quiet while it loads, since this package logs what matters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of transformers inside the block."""
    verbosity = transformers.logging.get_verbosity()
    bars_enabled = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars_enabled:
            transformers.logging.enable_progress_bar()
