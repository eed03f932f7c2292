"""Losses between a teacher and a student that split text differently (METHOD 4): they compare spans
of text, not ids.

Shapes: n loss tokens of the student, m of the teacher, s spans, v and v' ids of their heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocl_ds.data.batches import Batch, Translated
from pocl_ds.losses.divergences import working_type
from pocl_ds.models.heads import Head
from pocl_ds.models.vocab import Ids


@dataclass(frozen=True)
class OtherTokens:
    """A teacher that reads the same text in its own tokens. Where the student's loss head asks it
    about a token, it is asked by the number of one of the teacher's own tokens, -1 for none.
    """

    hidden: Tensor  # [m, width]
    head: Head
    ids: Ids  # the teacher's own
    labels: Tensor  # [m] int64
    translated: Translated

    def log_p(self, rows: Tensor, temperature: float, kind: torch.dtype) -> Tensor:
        """Log-probabilities [rows, v'] for the teacher's tokens of these numbers, -inf where an id
        stands for no token.
        """
        logits = self.ids.student_logits(self.head, self.hidden[rows])
        return torch.log_softmax(logits.to(kind).div_(temperature), -1)


def pairs(batch: Batch, translated: Translated, *, by_position: bool) -> Tensor:
    """[n] int64: the teacher's loss token that predicts from the same text as each of the
    student's, -1 for none.

    These are the first tokens of each span. by_position pairs the i-th tokens of both responses
    instead, whatever text they follow, and leaves the rest of the longer one out, as the paper of
    `uld` does.
    """
    if by_position:
        ours, theirs = batch.sample_of_token, translated.batch.sample_of_token
        places = _places(ours), _places(theirs)
        width = max([len(batch.labels), len(translated.batch.labels)]) + 1
        number = ours.new_full((len(batch.rows) * width + 1,), -1)
        number[theirs * width + places[1]] = torch.arange(len(theirs), device=theirs.device)
        return number[ours * width + places[0]]
    starts = [_starts(side) for side in (translated.ours, translated.theirs)]
    number = torch.full(
        (translated.spans + 1,), -1, dtype=torch.int64, device=translated.theirs.device
    )
    number[translated.theirs[starts[1]]] = torch.nonzero(starts[1])[:, 0]
    return torch.where(starts[0], number[translated.ours], -1)


def uld(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Universal logit distillation (Boizard et al., arXiv 2402.12030): sum of |p - q| over both
    sorted, largest first.

    That is the Wasserstein distance of the two distributions where moving a probability from any id
    to any other costs the same. log_p: [k, v'], log_q: [k, v], the shorter is as if it had ids of
    probability 0. Returns [k], and its gradient with respect to the logits of log_q [k, v].
    """
    p = log_p.exp().sort(dim=-1, descending=True).values
    q, order = log_q.exp().sort(dim=-1, descending=True)
    common = min(p.shape[-1], q.shape[-1])
    apart = q.clone()
    apart[:, :common] -= p[:, :common]
    value = apart.abs().sum(-1) + p[:, common:].sum(-1)
    slope = apart.sign_().mul_(q)  # dq_i / dz_j = q_i (1[i = j] - q_j)
    slope.sub_(q.mul_(slope.sum(-1, keepdim=True)))
    return value, torch.empty_like(slope).scatter_(-1, order, slope)


def alm(log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083): KL(p^(1/temperature) ||
    q^(1/temperature)) of whether a span is written or not. log_p, log_q: [s] log-probabilities of whole
    spans. Returns [s].
    """
    log_p, log_q = log_p / temperature, log_q / temperature
    return log_p.exp() * (log_p - log_q) + _not(log_p).exp() * (_not(log_p) - _not(log_q))


def alm_weights(
    ours: Tensor,
    theirs: Tensor,
    translated: Translated,
    *,
    temperature: float,
    sft_ratio: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """The divergence over all spans, and the weight of each student token's negative
    log-probability with which the gradient of sft_ratio CE + (1 - sft_ratio) factor KD is that of a
    weighted CE: [n].

    ours, theirs: log-probabilities of the tokens, [n] and [m].
    """
    with torch.enable_grad():
        leaf = ours.detach().requires_grad_()
        p, q = (
            _of_spans(theirs, translated.theirs, translated.spans),
            _of_spans(leaf, translated.ours, translated.spans),
        )
        kd = factor * alm(p, q, temperature).sum()
        slope = torch.autograd.grad(kd, leaf)[0]
    return kd.detach(), sft_ratio - (1 - sft_ratio) * slope


def token_log_probs(
    hidden: Tensor, labels: Tensor, logits: Callable[[Tensor], Tensor], rows: int
) -> Tensor:
    """Log-probabilities of labels [n], of hidden states [n, width], some rows of logits at a time;
    no gradient.
    """
    kind = working_type(hidden.dtype)
    found = [hidden.new_empty(0, dtype=kind)]
    with torch.no_grad():
        for part in (slice(i, i + rows) for i in range(0, len(labels), rows)):
            log_q = torch.log_softmax(logits(hidden[part]).to(kind), -1)
            found.append(log_q.gather(-1, labels[part, None])[:, 0])
    return torch.cat(found)


def _of_spans(values: Tensor, index: Tensor, spans: int) -> Tensor:
    """Sums of values [n] by span [s]; tokens of none fall into one more, which is cut off."""
    return values.new_zeros(spans + 1).index_add(0, torch.where(index < 0, spans, index), values)[
        :spans
    ]


def _not(log_p: Tensor) -> Tensor:
    """log(1 - p), finite also where p is 1."""
    return torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).eps)))


def _starts(spans: Tensor) -> Tensor:
    """[n] bool: the first token of each span."""
    before = torch.cat([spans.new_full((1,), -1), spans[:-1]])
    return (spans >= 0) & (spans != before)


def _places(samples: Tensor) -> Tensor:
    """[n]: the place of each loss token among its sample's."""
    number = torch.arange(len(samples), device=samples.device)
    first = torch.cat([samples.new_full((1,), -1), samples[:-1]]) != samples
    return (
        number - torch.cummax(torch.where(first, number, 0), 0).values if len(samples) else number
    )
