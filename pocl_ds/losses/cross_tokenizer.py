"""Losses between a teacher and a student with different tokenizers: they compare text, not token
ids (docs/method.md, eq. 20 and 21).

A span is a stretch of a response that begins and ends at a token boundary of both tokenizers.

Shapes: n loss tokens of the student, m of the teacher, s spans, v ids of the student's head, v'
of the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocl_ds.data.batches import Batch, TeacherView, place_in_sample
from pocl_ds.losses.divergences import compute_dtype
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap


@dataclass(frozen=True)
class CrossTokenizerTeacher:
    """A teacher that reads the same text in its own tokens: hidden states and the head that turns
    them into logits over the teacher's own ids.

    The fused head refers to the teacher's tokens by index; -1 means none.
    """

    hidden: Tensor  # [m, width]
    head: OutputHead
    vocab: VocabMap  # of the teacher's own ids
    labels: Tensor  # [m] int64
    view: TeacherView

    def log_probs(self, rows: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        """Log-probabilities [rows, v'] at the teacher tokens with these indices, -inf for ids
        without a token.
        """
        logits = self.vocab.student_logits(self.head, self.hidden[rows])
        return torch.log_softmax(logits.to(dtype).div_(temperature), -1)


def paired_teacher_tokens(batch: Batch, view: TeacherView, *, by_position: bool) -> Tensor:
    """For each student loss token, the index of the teacher loss token that predicts from the same
    text: [n] int64, -1 for none.

    Those are the first tokens of each span. by_position pairs the i-th tokens of both responses
    instead, regardless of their text, and ignores the end of the longer response, as the
    paper of `uld` does.
    """
    if by_position:
        samples, teacher_samples = batch.sample_of_token, view.batch.sample_of_token
        places, teacher_places = place_in_sample(samples), place_in_sample(teacher_samples)
        width = max(len(batch.labels), len(view.batch.labels)) + 1
        index = samples.new_full((len(batch.rows) * width + 1,), -1)
        teacher_tokens = torch.arange(len(teacher_samples), device=teacher_samples.device)
        index[teacher_samples * width + teacher_places] = teacher_tokens
        return index[samples * width + places]
    is_start, teacher_is_start = (
        _starts_span(spans) for spans in (view.student_spans, view.teacher_spans)
    )
    index = view.teacher_spans.new_full((view.num_spans + 1,), -1)
    index[view.teacher_spans[teacher_is_start]] = torch.nonzero(teacher_is_start)[:, 0]
    return torch.where(is_start, index[view.student_spans], -1)


def uld_with_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Universal logit distillation (Boizard et al., arXiv 2402.12030; docs/method.md, eq. 20):
    the sum of |p - q| over both sides' probabilities in descending order.

    That is the Wasserstein distance of the two distributions if moving a probability from any id
    to any other costs the same. log_p: [k, v'], log_q: [k, v]; the shorter one is extended by
    zeros. Returns the value [k] and its gradient in the logits of log_q [k, v].
    """
    p = log_p.exp().sort(dim=-1, descending=True).values
    q, order = log_q.exp().sort(dim=-1, descending=True)
    common = min(p.shape[-1], q.shape[-1])
    difference = q.clone()
    difference[:, :common] -= p[:, :common]
    value = difference.abs().sum(-1) + p[:, common:].sum(-1)
    slope = difference.sign_().mul_(q)  # dq_i / dz_j = q_i (1[i = j] - q_j)
    slope.sub_(q.mul_(slope.sum(-1, keepdim=True)))
    return value, torch.empty_like(slope).scatter_(-1, order, slope)


def alm(log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083; docs/method.md, eq.
    21): the KL divergence between p^(1 / temperature) and q^(1 / temperature) of the event that a
    model writes a span.

    log_p, log_q: [s] log-probabilities of whole spans. Returns [s].
    """
    log_p, log_q = log_p / temperature, log_q / temperature
    log_not_p, log_not_q = _log_complement(log_p), _log_complement(log_q)
    return log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)


@dataclass(frozen=True)
class SpanLoss:
    """The ALM loss of a batch, computed before its logits are.

    kd: [2], the divergence over all spans, without and with the weights of their samples.
    token_weights: [n], with which the gradient of a weighted cross-entropy equals that of the loss.
    """

    kd: Tensor
    token_weights: Tensor


def alm_span_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    view: TeacherView,
    weights: Tensor | None,
    *,
    temperature: float,
    sft_ratio: float,
    factor: float,
) -> SpanLoss:
    """The loss sft_ratio CE + (1 - sft_ratio) factor ALM over all spans.

    student_log_probs, teacher_log_probs: of the label tokens, [n] and [m]. weights: [n], factor of
    each student token's loss; None: 1. A span has that of its first token.
    """
    with torch.enable_grad():
        leaf = student_log_probs.detach().requires_grad_()
        log_p = _sum_by_span(teacher_log_probs, view.teacher_spans, view.num_spans)
        log_q = _sum_by_span(leaf, view.student_spans, view.num_spans)
        value = alm(log_p, log_q, temperature)
        kd = weighted_kd = factor * value.sum()
        if weights is not None:
            first = _starts_span(view.student_spans)
            by_span = weights.new_zeros(view.num_spans)
            by_span[view.student_spans[first]] = weights[first]
            weighted_kd = factor * (value * by_span).sum()
        slope = torch.autograd.grad(weighted_kd, leaf)[0]
    ce_weights = sft_ratio if weights is None else sft_ratio * weights
    sums = torch.stack([kd, weighted_kd]).detach()
    return SpanLoss(sums, ce_weights - (1 - sft_ratio) * slope)


def label_log_probs(
    hidden: Tensor, labels: Tensor, logits: Callable[[Tensor], Tensor], rows: int
) -> Tensor:
    """Log-probabilities of labels [n] given hidden states [n, width], without a gradient.

    logits: maps hidden states to logits; it gets at most `rows` of them at a time.
    """
    dtype = compute_dtype(hidden.dtype)
    parts = [hidden.new_empty(0, dtype=dtype)]
    with torch.no_grad():
        for chunk in (slice(i, i + rows) for i in range(0, len(labels), rows)):
            log_q = torch.log_softmax(logits(hidden[chunk]).to(dtype), -1)
            parts.append(log_q.gather(-1, labels[chunk, None])[:, 0])
    return torch.cat(parts)


def _sum_by_span(values: Tensor, spans: Tensor, num_spans: int) -> Tensor:
    """Sums [s] of values [n] by span; tokens without a span go into an extra entry that is cut
    off.
    """
    index = torch.where(spans < 0, num_spans, spans)
    return values.new_zeros(num_spans + 1).index_add(0, index, values)[:num_spans]


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p), finite also where p is 1."""
    return torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).eps)))


def _starts_span(spans: Tensor) -> Tensor:
    """[n] bool: whether a token is the first of its span."""
    previous = torch.cat([spans.new_full((1,), -1), spans[:-1]])
    return (spans >= 0) & (spans != previous)
