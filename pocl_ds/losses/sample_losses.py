"""Losses of each sample of a batch under teacher and student, without a gradient: what the current
student is ranked by when a stage begins.

Shapes: n loss tokens, d width of the student, d' of the teacher, v ids that take part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pocl_ds.losses.divergences import (
    DIVERGENCES,
    compute_dtype,
    divergence_options,
    log_probabilities,
)
from pocl_ds.losses.token_losses import TeacherHead
from pocl_ds.models.heads import HeadMixture, OutputHead
from pocl_ds.models.vocab import VocabMap

# Per sample, summed over its loss tokens, in nats, [samples] float64: the student's cross-entropy,
# the divergence, and the teacher's cross-entropy. A tuple, see `LossSums`.
SampleLosses: TypeAlias = tuple[Tensor, Tensor, Tensor]

LIVE_LOGITS = 8  # float32 copies of a chunk's logits in memory at once


@dataclass(frozen=True)
class SampleTerms:
    """Asks for the losses of each sample, at temperature 1, in place of their sum. name: of the
    divergence; `sft` for the student's cross-entropy alone.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def sample_losses(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    sample_of_token: Tensor,
    samples: int,
    terms: SampleTerms,
    *,
    vocab: VocabMap,
    teacher_hidden: Tensor | None,
    teacher_head: TeacherHead | None,
    chunk_bytes: int,
) -> SampleLosses:
    """The losses of each sample.

    hidden: [n, d]; labels, sample_of_token: [n] int64; teacher_hidden: [n, d'], concatenated along
    d' for a `HeadMixture`. Without a teacher, and with `sft`, the last two are 0.
    """
    options = divergence_options(terms.name, terms.options)
    dtype = compute_dtype(hidden.dtype)
    sums = hidden.new_zeros(3, samples, dtype=torch.float64)
    rows = max(1, chunk_bytes // (LIVE_LOGITS * vocab.size * dtype.itemsize))
    for chunk in (slice(i, i + rows) for i in range(0, len(labels), rows)):
        own, label = sample_of_token[chunk], labels[chunk, None]
        log_q = log_probabilities(vocab.student_logits(head, hidden[chunk]), 1.0, dtype)
        sums[0].index_add_(0, own, -log_q.gather(1, label)[:, 0].double())
        if teacher_hidden is None or terms.name == "sft":
            continue
        log_p = _teacher_log_probs(teacher_head, teacher_hidden[chunk], vocab, dtype)
        value = DIVERGENCES[terms.name](log_p, log_q, **options)
        sums[1].index_add_(0, own, value.double())
        sums[2].index_add_(0, own, -log_p.gather(1, label)[:, 0].double())
    return sums[0], sums[1], sums[2]


def _teacher_log_probs(
    head: TeacherHead | None, hidden: Tensor, vocab: VocabMap, dtype: torch.dtype
) -> Tensor:
    """log p [n, v] at temperature 1, mixed over an ensemble."""
    if isinstance(head, OutputHead):
        return log_probabilities(vocab.teacher_logits(head, hidden), 1.0, dtype)
    assert isinstance(head, HeadMixture), "a recipe check excludes other teachers"
    parts = [
        _teacher_log_probs(member, states, vocab, dtype) + math.log(weight)
        for member, states, weight in zip(
            head.heads, head.split_hidden(hidden), head.weights, strict=True
        )
    ]
    return torch.logsumexp(torch.stack(parts), 0)
