"""The teacher: hidden states at loss positions, and the head that makes distributions of them.

A small protocol, so that hidden states can come from a live model or from a store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from pocl_ds import distributed
from pocl_ds.data.batches import Batch
from pocl_ds.distill.engine import FrozenEngine
from pocl_ds.distill.student import TeacherBackbone
from pocl_ds.models.heads import Head, head_of
from pocl_ds.models.vocabulary import Ids


class Teacher(Protocol):
    """Who gives the target distributions. Every method is called by all ranks together."""

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states of the batch's loss tokens: [loss tokens, width]."""

    def head(self) -> contextlib.AbstractContextManager[Head]:
        """The head, whole on every rank while the block lasts."""


class LiveTeacher:
    """A frozen model, its body sharded by ZeRO-3 where a configuration is given."""

    def __init__(self, model: PreTrainedModel, ds_config: dict[str, Any] | None, ids: Ids) -> None:
        self.model, self.ids = model, ids.to(distributed.device())
        self._head = head_of(model)
        self.engine = FrozenEngine(TeacherBackbone(model), ds_config)

    def hidden(self, batch: Batch) -> Tensor:
        """See `Teacher`."""
        states: Tensor = self.engine(replace(batch, input_ids=self.ids.teacher_inputs(batch.input_ids)))
        return states

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """See `Teacher`."""
        parameters = [p for p in (self._head.weight, self._head.bias) if p is not None]
        with self.engine.whole(parameters):
            yield self._head
