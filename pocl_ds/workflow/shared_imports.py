"""The imports that take seconds and that several workflow steps share: `fork_server` runs them once
for all.

They must not run tensor operations or touch a GPU, since a fork would break the state of both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable


def _import_models() -> None:
    """What every step imports that reads a tokenizer or a model."""
    for name in ("pocl_ds.models.load", "pocl_ds.models.heads", "datasets"):
        importlib.import_module(name)


def _import_vllm() -> None:
    _import_models()
    from pocl_ds.generation.vllm_engine import import_engine

    import_engine()


SHARED_IMPORTS: dict[str, Callable[[], None]] = {"models": _import_models, "vllm": _import_vllm}
