"""Teachers: outputs at the loss tokens, and the head that turns them into distributions.

The protocol is small, so that outputs can come from a model or from a cache.
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
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.engines.frozen_model import FrozenModel, TeacherBackbone
from pocl_ds.errors import ArtifactError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.losses.token_losses import TeacherHead
from pocl_ds.models.heads import (
    HeadMixture,
    OutputHead,
    identity_head,
    output_head,
)
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache import TeacherCache
from pocl_ds.workflow.files import read_json


class Teacher(Protocol):
    """The source of the target distributions. All ranks call every method together."""

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> str | None:
        """A sentence about the first of these rows of a split whose outputs are not available, or
        None. No other rank takes part, and it may run in another thread.
        """

    def outputs(self, batch: Batch) -> Tensor:
        """The input of the head for the batch's loss tokens: final hidden states [loss tokens,
        width], or records [loss tokens, bytes] of a `RecordCodec`. For a batch with a teacher view,
        the loss tokens are the teacher's own.
        """

    def head(self) -> contextlib.AbstractContextManager[TeacherHead]:
        """The head. Its weights are gathered on every rank inside the block."""


class OnlineTeacher:
    """A frozen model that runs forward in every step. With a DeepSpeed configuration ZeRO-3 shards
    its body.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ds_config: dict[str, Any] | None,
        vocab: VocabMap,
        *,
        split: bool = True,
    ) -> None:
        """split: see `Student`."""
        self.model, self.vocab = model, vocab.to(distributed.device())
        self._head = output_head(model) if split else identity_head(model)
        self.engine = FrozenModel(TeacherBackbone(model, split=split), ds_config)

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`. A model can read any row."""

    def outputs(self, batch: Batch) -> Tensor:
        """See `Teacher`."""
        hidden: Tensor = self.engine.forward(teacher_batch(batch, self.vocab))
        return hidden

    @contextlib.contextmanager
    def head(self) -> Iterator[OutputHead]:
        """See `Teacher`."""
        parameters = [p for p in (self._head.weight, self._head.bias) if p is not None]
        with self.engine.gathered(parameters):
            yield self._head

    def close(self) -> None:
        """Release the model, so that it is freed with its last owner."""
        self.engine.close()


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights of an ensemble, divided by their sum."""
    return tuple(weight / sum(weights) for weight in weights)


class TeacherEnsemble:
    """Several online teachers that read the same tokens; the target is the mixture of their
    distributions (docs/method.md, eq. 22).
    """

    def __init__(self, teachers: Sequence[OnlineTeacher], weights: Sequence[float]) -> None:
        self.teachers = tuple(teachers)
        self.weights = normalized(weights)

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`. Models can read any row."""

    def outputs(self, batch: Batch) -> Tensor:
        """See `Teacher`: the hidden states of all teachers, concatenated along the width."""
        return torch.cat([teacher.outputs(batch) for teacher in self.teachers], dim=-1)

    @contextlib.contextmanager
    def head(self) -> Iterator[HeadMixture]:
        """See `Teacher`."""
        with contextlib.ExitStack() as stack:
            heads = tuple(stack.enter_context(teacher.head()) for teacher in self.teachers)
            yield HeadMixture(heads, self.weights)

    def close(self) -> None:
        """Release the models, so that they are freed with their last owner."""
        for teacher in self.teachers:
            teacher.close()


class CachedTeacher:
    """The outputs that `pocl cache-teacher` wrote, and the teacher's head on each rank. The body of
    the model is not loaded.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._head = cache.codec or self._load_head(cache.directory / "head")

    def _load_head(self, folder: Path) -> OutputHead:
        """The head that `pocl cache-teacher` wrote, in the dtype of the hidden states."""
        device, dtype = distributed.device(), self.cache.state_dtype
        parameters = {
            name: nn.Parameter(value.to(device, dtype), requires_grad=False)
            for file in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        settings = read_json(folder / "head.json")
        return OutputHead(
            parameters["weight"], parameters.get("bias"), settings["scale"], settings["soft_cap"]
        )

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> str | None:
        """See `Teacher`."""
        return self.cache.find_damage(split, rows)

    def read(self, dataset: TokenizedDataset, batch: Batch) -> Batch:
        """The batch, made from rows of `dataset`, with its cached outputs on the host."""
        outputs = self.cache.read(dataset.name, batch.rows, batch.loss_token_range)
        return replace(batch, teacher_outputs=outputs)

    def outputs(self, batch: Batch) -> Tensor:
        """See `Teacher`. They are read now, unless the batch brings them."""
        outputs = batch.teacher_outputs
        if outputs is None:
            outputs = self.cache.read(batch.split, batch.rows, batch.loss_token_range)
            outputs = outputs.to(distributed.device())
        return self.cache.decode(outputs)

    @contextlib.contextmanager
    def head(self) -> Iterator[OutputHead | RecordCodec]:
        """See `Teacher`."""
        yield self._head

    def close(self) -> None:
        """Do nothing: the cache is closed with its last owner."""


def teacher_batch(batch: Batch, vocab: VocabMap) -> Batch:
    """The batch as a teacher reads it: in its own tokens or ids, or with its own prompts."""
    if batch.teacher_view:
        return batch.teacher_view.batch
    if batch.teacher_batch:
        return batch.teacher_batch
    return replace(batch, input_ids=vocab.teacher_inputs(batch.input_ids))


def verify_damage(damage: str | None) -> None:
    """Raise ArtifactError on all ranks if the teacher's outputs are damaged on any rank; all ranks
    call it together, each with what `Teacher.find_damage` returned.
    """
    flag = torch.tensor([damage is not None], dtype=torch.int32, device=distributed.device())
    # Reduce one number first, and send the message only if there is damage.
    if distributed.all_sum(flag).item():
        raise_damage(damage)


def raise_damage(damage: str | None) -> None:
    """Raise ArtifactError on a rank with damage, and ResourceError on the others. All ranks call it
    together.
    """
    with distributed.raise_on_all_ranks("read the teacher cache"):
        if damage:
            raise ArtifactError(damage)
