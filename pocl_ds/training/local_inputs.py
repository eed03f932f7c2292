"""The models and data of a training on the local disk of each node (`train.local_copy`)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocl_ds.models.load import model_files
from pocl_ds.runtime import distributed
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.files import file_digest
from pocl_ds.workflow.local_copy import copy_files, expand_folder, hold_copy
from pocl_ds.workflow.manifest import MANIFEST, fingerprint, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

FIELD = "train.local_copy"
# Where the Hub's cache keeps large files: named by their sha256.
HUB_BLOB = re.compile(r".*/blobs/([0-9a-f]{64})")


@contextlib.contextmanager
def local_inputs(
    run: RunDirectory, training: TrainingRun
) -> Iterator[tuple[RunDirectory, TrainingRun]]:
    """A training that reads its models and tokenized data from copies on this node's disk, and a
    run directory whose `data` is such a copy; without `train.local_copy` both as they are.

    All ranks call it together. The last process of a node that leaves the block removes the
    copies. A teacher on its own ranks, and one whose outputs are cached, are read where they
    are. Raises as `expand_folder` and `copy_files`.
    """
    if training.train.local_copy is None:
        yield run, training
        return
    models, results = {training.student_path}, {run.data}
    teacher = training.teacher
    if teacher and not training.teacher_cache and teacher.placement != "own_ranks":
        models |= set(training.teacher_paths)
    if training.teacher_responses:
        results.add(training.teacher_responses)

    copies: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        with distributed.raise_on_all_ranks("copy models and data to the local disk"):
            folder = expand_folder(training.train.local_copy, FIELD)
            for directory in [*map(Path, sorted(models)), *sorted(results)]:
                is_model = directory not in results
                files = model_files(directory) if is_model else _result_files(directory)
                target = folder / f"{'model' if is_model else 'data'}-{_key(directory, files)}"
                stack.enter_context(hold_copy(target))
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    _copy(directory, files, target, is_model=is_model)
                copies[str(directory)] = str(target)
        responses = training.teacher_responses
        yield (
            RunDirectory(run.path, data=Path(copies[str(run.data)])),
            replace(
                training,
                student_path=copies[training.student_path],
                teacher_paths=tuple(copies.get(path, path) for path in training.teacher_paths),
                teacher_responses=Path(copies[str(responses)]) if responses else None,
            ),
        )


def _result_files(directory: Path) -> list[Path]:
    """The files of a step's finished result; its manifest comes last."""
    manifest = read_manifest(directory)
    names = manifest.files if manifest else {}
    return [*(directory / name for name in names), directory / MANIFEST]


def _key(directory: Path, files: Iterable[Path]) -> str:
    """A name that changes with the files, from what their file system says of them."""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return fingerprint([str(directory.resolve()), states])[:16]


def _copy(directory: Path, files: list[Path], target: Path, *, is_model: bool) -> None:
    remedy = "run `pocl verify`"
    if is_model:
        remedy = "remove it, and download the model again"
    copy_files(
        directory,
        {str(path.relative_to(directory)): _digest(path) for path in files},
        target,
        name=f"{'model' if is_model else 'data'} {directory}",
        field=FIELD,
        remedy=remedy,
    )


def _digest(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, of a large one in the Hub's cache by its name."""
    blob = HUB_BLOB.fullmatch(str(path.resolve()))
    return {"bytes": path.stat().st_size, "sha256": blob[1]} if blob else file_digest(path)
