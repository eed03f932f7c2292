"""Teachers on their own ranks: the student's connection to these ranks, and what it lets them
load.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence

import torch

from pocl_ds.errors import Interrupted, RecipeError
from pocl_ds.models.checkpoint_head import load_output_head
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.heads import HeadMixture, OutputHead, identity_head
from pocl_ds.models.load import empty_model
from pocl_ds.models.recipe_model import read_model_config
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.runtime.job_roles import JobRoles
from pocl_ds.teachers.remote import RemoteTeacher
from pocl_ds.teachers.requests import TeacherClient
from pocl_ds.teachers.routed import RoutedModel
from pocl_ds.training.training_run import TrainingRun

log = logging.getLogger("pocl_ds")

_client: TeacherClient | None = None


@contextlib.contextmanager
def teacher_connection(roles: JobRoles) -> Iterator[None]:
    """Within the block the trainings of this rank of the student may use the teacher's ranks, which
    end after it. If an error ends the block, they end because this process does.
    """
    global _client
    _client = TeacherClient(roles)
    try:
        yield
    except Interrupted:
        _client.close(interrupted=True)
        raise
    _client.close()
    _client = None


def teacher_client() -> TeacherClient:
    """The connection of this process. Raises RecipeError if the teacher has no ranks."""
    if _client is None:
        raise RecipeError(
            "teacher.placement=own_ranks needs the ranks that `pocl run` and the workflow steps "
            "start, and this command starts none: set teacher.placement=with_student"
        )
    return _client


class RemoteLoader:
    """Lets the teacher's ranks load teachers. All ranks of the student call every method
    together.
    """

    def __init__(self, training: TrainingRun, vocab: VocabMap, client: TeacherClient) -> None:
        assert training.teacher is not None
        self.training, self.config = training, training.teacher
        self.vocab, self.client = vocab, client
        self._numbers = itertools.count()

    def __call__(self, model: RoutedModel) -> RemoteTeacher:
        """Start loading a teacher, with the settings of the first one."""
        return self._load([model], self._head(model))

    def load_ensemble(
        self, models: Sequence[RoutedModel], weights: tuple[float, ...]
    ) -> RemoteTeacher:
        """Start loading the members of an ensemble; their weights have the sum 1."""
        return self._load(models, HeadMixture(tuple(map(self._head, models)), weights))

    def _load(self, models: Sequence[RoutedModel], head: OutputHead | HeadMixture) -> RemoteTeacher:
        sources = [self.config.named_sources[model.fields[0]] for model in models]
        members = [
            {"path": model.path, "config": self.config.of_source(source).model_dump(mode="json")}
            for model, source in zip(models, sources, strict=True)
        ]
        settings = {
            "members": members,
            "train": self.training.train.model_dump(mode="json"),
            "fused": self.training.loss.fused,
            "logs": str(self.training.directory / "logs"),
        }
        number, dtype = next(self._numbers), getattr(torch, resolve_dtype(self.config.dtype))
        loading = self.client.load(number, settings)
        return RemoteTeacher(self.client, number, head, dtype, self.vocab, loading)

    def _head(self, model: RoutedModel) -> OutputHead:
        """The head of a teacher on this rank."""
        source = self.config.named_sources[model.fields[0]]
        if not self.training.loss.fused:
            config = read_model_config(model.path, source)
            return identity_head(empty_model(config, trust_remote_code=source.trust_remote_code))
        return load_output_head(
            model.path,
            dtype=resolve_dtype(self.config.dtype),
            device=distributed.device(),
            trust_remote_code=source.trust_remote_code,
            revision=source.revision,
        )
