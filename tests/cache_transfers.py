"""Exporting and importing teacher caches of a few samples, for tests of the format.

`python -m cache_transfers export|import RUN FOLDER MODEL MODE NUMBER` kills itself with SIGKILL
before the given write of outputs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.config import StudentConfig, TeacherCacheConfig, TeacherConfig
from pocl_ds.data.split_writer import save_split
from pocl_ds.teachers import cache_export, cache_import
from pocl_ds.teachers.cache_export import export_cache
from pocl_ds.teachers.cache_format import DataIdentity, ModelIdentity
from pocl_ds.teachers.cache_import import import_cache
from pocl_ds.teachers.cache_step import CacheLayout, cache_teacher, plan_cache
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.workflow.run_dir import RunDirectory

TEMPERATURES, FINGERPRINT, PROMPT = (1.0, 2.0), "f", 3
DATA = DataIdentity({"vocabulary": "v", "rules": "r"}, {"name": "alpaca", "sha256": "t"})
MODEL = ModelIdentity(
    "org/teacher", {"model.safetensors": [1, "m"], "config.json": [1, "c"]}, "none"
)
SAMPLES = 7


def sequences() -> list[list[int]]:
    """Random tokens of the tiny models; the last sample has those of the first."""
    draw = np.random.default_rng(1)
    made = [draw.integers(5, 300, 9 + 4 * row).tolist() for row in range(SAMPLES - 1)]
    return [*made, made[0]]


def write_data(
    folder: Path, rows: Sequence[int] = tuple(range(SAMPLES)), validation: int = 2
) -> RunDirectory:
    """A run directory with these of the samples."""
    run, tokens = RunDirectory(folder), sequences()
    run.data.mkdir(parents=True)
    save_split(
        run.data,
        "train",
        [f"s{row}" for row in rows],
        [tokens[row] for row in rows],
        [PROMPT] * len(rows),
    )
    save_split(run.data, "validation", [f"s{validation}"], [tokens[validation]], [PROMPT])
    return run


class CacheRun:
    """A run on a tiny model. config: fields of section `teacher_cache`."""

    def __init__(
        self,
        run: RunDirectory,
        model: Path,
        mode: Any,
        *,
        temperatures: tuple[float, ...] = TEMPERATURES,
        dtype: Any = "auto",
        **config: Any,
    ) -> None:
        self.run = run
        self.config = TeacherCacheConfig(**{"top_k": 6, "num_samples": 9, **config})
        self.arguments: dict[str, Any] = {
            "teacher": TeacherConfig(model=str(model), mode=mode, dtype=dtype),
            "student": StudentConfig(model=str(model)),
            "config": self.config,
            "usage": TeacherUsage(1.0, temperatures),
            "model_fingerprints": {"teacher": FINGERPRINT},
        }

    def fill(self, **arguments: Any) -> None:
        """Run the step."""
        cache_teacher(self.run, **self.arguments, seed=5, fingerprint=FINGERPRINT, **arguments)

    def layout(self) -> CacheLayout:
        """The layout of the cache."""
        return plan_cache(self.run, **self.arguments)

    def export_to(self, target: Path, fingerprint: str = FINGERPRINT) -> None:
        """Export the cache."""
        export_cache(
            self.run,
            target,
            self.layout(),
            fingerprint=fingerprint,
            data=DATA,
            models={"teacher": MODEL},
            hidden_dtype=self.config.hidden_dtype,
        )

    def import_from(
        self, source: Path, data: DataIdentity = DATA, model: ModelIdentity = MODEL
    ) -> None:
        """Import an exported cache."""
        import_cache(
            self.run,
            source,
            self.layout(),
            config=self.config,
            fingerprint=FINGERPRINT,
            data=data,
            models={"teacher": model},
        )


def _kill_at(owner: Any, name: str, number: int) -> None:
    """Make the call with this number of a function the last thing that this process does."""
    original, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    command, folder, other, model, mode, number = sys.argv[1:]
    part = CacheRun(RunDirectory(folder), Path(model), mode)
    if command == "export":
        _kill_at(cache_export, "save_file", int(number))
        part.export_to(Path(other))
    else:
        _kill_at(cache_import.CacheShard, "write", int(number))
        part.import_from(Path(other))
