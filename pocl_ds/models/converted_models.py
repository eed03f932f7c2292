"""The cache of models that were converted into a Hugging Face folder: from GGUF, or by merging an
adapter.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from pocl_ds.resources import cache_folder
from pocl_ds.workflow.files import atomic_directory, explain_disk_errors
from pocl_ds.workflow.locks import hold_lock

log = logging.getLogger("pocl_ds")


def models_folder() -> Path:
    """The folder of converted models: POCL_CACHE, else `models` in the cache."""
    override = os.environ.get("POCL_CACHE")
    return Path(override) if override else cache_folder() / "models"


def convert_once(name: str, convert: Callable[[Path], None], *, action: str) -> Path:
    """The folder `name` of the cache, written by `convert` on the first call.

    Concurrent processes wait for the one that converts. name: tells the content, so that a changed
    source has another folder. action: for the log, as in `dequantizing a.gguf`. Raises what
    `convert` raises, and ResourceError for a full disk.
    """
    cache = models_folder()
    folder = cache / name
    if folder.is_dir():
        return folder
    with explain_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with hold_lock(cache / f".{name}.lock", fcntl.LOCK_EX):
        if not folder.is_dir():
            start = time.monotonic()
            log.info("%s into %s, once", action, folder)
            with atomic_directory(folder) as temporary:
                convert(temporary)
            log.info("%s took %.0f s", action, time.monotonic() - start)
    return folder
