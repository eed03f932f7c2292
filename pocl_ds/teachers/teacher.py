"""The teacher: hidden states at loss positions, and the head that makes distributions of them.

A small protocol, so that they can come from a live model or from a store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl_ds.data.batches import Batch
from pocl_ds.engines.engine import FrozenEngine
from pocl_ds.errors import ArtifactError
from pocl_ds.losses.token_losses import TeacherHead
from pocl_ds.losses.top_k import TopK
from pocl_ds.models.heads import Head, Mixture, head_of, unsplit
from pocl_ds.models.vocab import Ids
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache import TeacherStore
from pocl_ds.training.student import TeacherBackbone
from pocl_ds.workflow.run_dir import read_json


class Teacher(Protocol):
    """Who gives the target distributions. Every method is called by all ranks together."""

    def require(self, split: str, rows: NDArray[np.int64]) -> None:
        """Make sure that these rows of a split can be asked for next. Raises ArtifactError on all
        ranks where one's cannot.
        """

    def states(self, batch: Batch) -> Tensor:
        """What the head makes distributions of, for the batch's loss tokens: final hidden states
        [loss tokens, width], or records [loss tokens, bytes] of a `TopK`. Of a batch that is
        translated: for the teacher's own loss tokens.
        """

    def head(self) -> contextlib.AbstractContextManager[TeacherHead]:
        """The head, whole on every rank while the block lasts."""


class LiveTeacher:
    """A frozen model, its body sharded by ZeRO-3 where a configuration is given."""

    def __init__(
        self,
        model: PreTrainedModel,
        ds_config: dict[str, Any] | None,
        ids: Ids,
        *,
        split: bool = True,
    ) -> None:
        """split: see `Student`."""
        self.model, self.ids = model, ids.to(distributed.device())
        self._head = head_of(model) if split else unsplit(model)
        self.engine = FrozenEngine(TeacherBackbone(model, split=split), ds_config)

    def require(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`: a live model answers anything."""

    def states(self, batch: Batch) -> Tensor:
        """See `Teacher`."""
        translated = batch.translated
        read = (
            translated.batch
            if translated
            else replace(batch, input_ids=self.ids.teacher_inputs(batch.input_ids))
        )
        states: Tensor = self.engine(read)
        return states

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """See `Teacher`."""
        parameters = [p for p in (self._head.weight, self._head.bias) if p is not None]
        with self.engine.whole(parameters):
            yield self._head


class Teachers:
    """Several live models over the same tokens, asked one after the other; their distributions are
    mixed.
    """

    def __init__(self, teachers: Sequence[LiveTeacher], weights: Sequence[float]) -> None:
        self.teachers = tuple(teachers)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def require(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`: live models answer anything."""

    def states(self, batch: Batch) -> Tensor:
        """See `Teacher`: hidden states side by side."""
        return torch.cat([teacher.states(batch) for teacher in self.teachers], dim=-1)

    @contextlib.contextmanager
    def head(self) -> Iterator[Mixture]:
        """See `Teacher`."""
        with contextlib.ExitStack() as stack:
            yield Mixture(
                tuple(stack.enter_context(teacher.head()) for teacher in self.teachers),
                self.weights,
            )


class StoredTeacher:
    """What `pocl cache-teacher` kept, and the head that reads it, whole on each rank; the model's body is
    not there.
    """

    def __init__(self, store: TeacherStore) -> None:
        self.store = store
        self._head = (
            TopK(**store.top_k) if store.top_k else self._read_head(store.directory / "head")
        )

    def _read_head(self, folder: Path) -> Head:
        store = self.store
        where, kind = distributed.device(), getattr(torch, store.dtype)
        state = {
            name: value
            for file in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        parts = {
            name: nn.Parameter(value.to(where, kind), requires_grad=False)
            for name, value in state.items()
        }
        shape = read_json(folder / "head.json")
        return Head(parts["weight"], parts.get("bias"), shape["scale"], shape["soft_cap"])

    def require(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`."""
        fault = self.store.fault(split, rows)
        flag = torch.tensor([fault is not None], dtype=torch.int32, device=distributed.device())
        if distributed.all_sum(flag).item():
            with distributed.together("read the teacher's hidden states"):
                if fault:
                    raise ArtifactError(fault)

    def states(self, batch: Batch) -> Tensor:
        """See `Teacher`."""
        return self.store.read(batch.split, batch.rows).to(distributed.device())

    @contextlib.contextmanager
    def head(self) -> Iterator[Head | TopK]:
        """See `Teacher`."""
        yield self._head
