"""pocl_ds distils a large language model into a small one by curriculum (POCL, arXiv 2506.05695).

    from pocl_ds import Recipe, distill, run, submit

`distill` takes models and data and returns the paths and metrics of the finished run; `run` does
the same for a recipe, and `submit` submits it to SLURM. The parts work alone, without a run
directory: `pocl_ds.losses`, `pocl_ds.curriculum`, `pocl_ds.scoring` and `pocl_ds.models.vocab`.
`pocl_ds.integrations` brings the curriculum into the trainers of transformers and TRL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocl_ds.api import RunResult, distill, run, submit
    from pocl_ds.config import Recipe

__version__ = "0.2.0"
__all__ = ["Recipe", "RunResult", "__version__", "distill", "run", "submit"]

_MODULES = {
    "Recipe": "pocl_ds.config",
    "RunResult": "pocl_ds.api",
    "distill": "pocl_ds.api",
    "run": "pocl_ds.api",
    "submit": "pocl_ds.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import pocl_ds` loads nothing heavy."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'pocl_ds' has no attribute {name!r}")
