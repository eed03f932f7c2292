"""Paths, identities and loading of the models that are evaluated."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.errors import ArtifactError
from pocl_ds.models.attention import FAMILIES, PER_SAMPLE
from pocl_ds.models.load import embedding_rows, load_model, load_model_config, load_tokenizer
from pocl_ds.models.vocab import VocabMap, VocabularyAlignment, align_vocabularies
from pocl_ds.runtime.distributed import device
from pocl_ds.workflow.run_dir import RunDirectory, read_models

TEACHER = "teacher"


def model_path(run: RunDirectory, model: str) -> str:
    """The folder or Hub name of `teacher`, `initial`, `student` or `baseline`.

    Raises:
        ArtifactError: the run does not have this model yet.
    """
    if model in (TEACHER, "initial"):
        path = read_models(run)[TEACHER if model == TEACHER else "student"]
        if path is None:
            raise ArtifactError("this recipe has no teacher: remove it from evaluate.models")
        return str(path)
    step, folder = ("train", run.train) if model == "student" else ("baseline", run.baseline)
    final = folder / "final"
    if not final.is_dir():
        raise ArtifactError(f"{final} is missing: run `pocl {step}` first")
    return str(final)


def model_identity(path: str) -> Any:
    """Names, sizes and modification times of a model's weight files; a Hub name as it is."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class ModelLoader:
    """Loads the models of an evaluation by name.

    Args:
        paths: model -> folder or Hub name.
        dtype: of the weights.
        trusted: the models whose own Python code may run.
    """

    def __init__(self, paths: dict[str, str], dtype: str, trusted: Collection[str]) -> None:
        self.paths, self.dtype, self.trusted = paths, dtype, trusted
        self.students = [name for name in paths if name != TEACHER]

    def model(self, name: str) -> Any:
        """The model with frozen weights, in evaluation mode on this process's device."""
        path, trust = self.paths[name], name in self.trusted
        family = load_model_config(path, trust_remote_code=trust).model_type
        model: Any = load_model(
            path,
            dtype=self.dtype,
            attention=PER_SAMPLE if family in FAMILIES else None,
            trust_remote_code=trust,
        )
        return model.to(device()).eval().requires_grad_(False)

    def tokenizer(self, name: str) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.paths[name], trust_remote_code=name in self.trusted)

    def vocabulary_rows(self, name: str) -> int:
        """Rows of the model's embedding."""
        config = load_model_config(self.paths[name], trust_remote_code=name in self.trusted)
        return embedding_rows(config)

    def rows_by_reader(self, ids: VocabMap) -> dict[str, int]:
        """Rows of the models that read the students' ids as they are."""
        names = self.students if ids.teacher_ids is not None else self.paths
        return {self.paths[name]: self.vocabulary_rows(name) for name in names}

    def shared_ids(self) -> VocabMap:
        """The ids that all models share, so that every number is over the same ids.

        Raises:
            IncompatibleTokenizers: the teacher splits text differently.
        """
        rows = {name: self.vocabulary_rows(name) for name in self.paths}
        if TEACHER not in self.paths:
            return VocabMap(min(rows.values()))
        if not self.students:
            return VocabMap(rows[TEACHER])
        teacher = self.tokenizer(TEACHER)
        alignments = [
            align_vocabularies(teacher, self.tokenizer(name), rows[TEACHER], rows[name])
            for name in self.students
        ]
        size = min(alignment.size for alignment in alignments)
        shared = np.ones(size, bool)
        for alignment in alignments:
            if alignment.shared is not None:
                shared &= alignment.shared[:size]
        teacher_ids = alignments[0].teacher_ids  # all students of a run have one tokenizer
        common = VocabularyAlignment(
            size,
            None if shared.all() else shared,
            "",
            None if teacher_ids is None else teacher_ids[:size],
        )
        return VocabMap.from_alignment(common).to(device())
