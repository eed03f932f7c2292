"""The check that an online teacher's outputs do not depend on the batch
(`models.batch_invariance`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import TeacherConfig
from pocl_ds.data.batches import Batch
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.losses.cross_tokenizer import label_log_probs
from pocl_ds.models.batch_invariance import check_batch_invariance
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.log_probs import LOGIT_ROWS
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime import distributed


class CheckedTeacher(Protocol):
    """A teacher with a single head."""

    vocab: VocabMap

    def outputs(self, batch: Batch) -> Tensor:
        """See `Teacher`."""

    def head(self) -> contextlib.AbstractContextManager[OutputHead]:
        """See `Teacher`."""


def teacher_dtype(config: TeacherConfig) -> str:
    """The dtype whose rounding a teacher has: quantized layers round at least like bfloat16."""
    return "bfloat16" if config.quantization != "none" else resolve_dtype(config.dtype)


def check_teacher(
    label: str,
    teacher: CheckedTeacher,
    dataset: TokenizedDataset,
    rows: Sequence[int],
    batch_of: Callable[[Sequence[int]], Batch],
    *,
    dtype: str,
) -> dict[str, Any]:
    """Check the teacher's log-probabilities of the loss tokens of some rows of a dataset.

    All ranks call it together. batch_of: builds the batch of some rows on this rank's device.
    Returns what the manifest records. Raises ModelError on all ranks if a sample depends on its
    batch.
    """

    def log_probs(places: Sequence[int]) -> list[NDArray[Any]]:
        return _log_probs(teacher, batch_of([rows[place] for place in places]), len(places))

    with distributed.raise_on_all_ranks("check the teacher's outputs"):
        return check_batch_invariance(
            label,
            [dataset.ids[row].decode() for row in rows],
            [int(dataset.loss_tokens[row]) for row in rows],
            log_probs,
            dtype=dtype,
            on_gpu=distributed.device().type == "cuda",
            remedy="set teacher.attn_implementation=eager, or choose another teacher",
        )


def _log_probs(teacher: CheckedTeacher, batch: Batch, samples: int) -> list[NDArray[Any]]:
    """Log-probabilities of the loss tokens of each of the batch's samples, over all ids of the
    teacher.
    """
    hidden = teacher.outputs(batch)
    own = batch.teacher_view.batch if batch.teacher_view else batch
    labels = own.labels if batch.teacher_view else teacher.vocab.teacher_inputs(own.labels)
    with teacher.head() as head:
        values = label_log_probs(hidden, labels, head.logits, LOGIT_ROWS).cpu()
    counts = np.bincount(own.sample_of_token.cpu().numpy(), minlength=samples).tolist()
    return [part.numpy() for part in values.split(counts)]
