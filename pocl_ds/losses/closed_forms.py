"""Divergences whose gradient in the student's logits is known: value and gradient in a few passes,
in place.

The same values as `divergences`, without a graph: a chunk then needs half the memory and half the
passes of autograd. A divergence that is not here goes through autograd.

Each function takes log p and log q [tokens, ids], both of which it may overwrite, and up to three
more buffers of their shape, `spare(0)` to `spare(2)`; it returns the value a token, and leaves in
log q the gradient of that value in the logits that log q is the log-softmax of. With g = dD/d log q
the gradient is g - q sum(g). A masked id holds `divergences.MASKED` on both sides and gets exactly
0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Spare: TypeAlias = Callable[[int], Tensor]


def fkl(log_p: Tensor, log_q: Tensor, spare: Spare) -> Tensor:
    """KL(p || q): gradient q - p."""
    p = torch.exp(log_p, out=spare(0))
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    log_q.exp_().sub_(p)
    return value


def rkl(log_p: Tensor, log_q: Tensor, spare: Spare) -> Tensor:
    """KL(q || p): gradient q (log q - log p - KL)."""
    q = torch.exp(log_q, out=spare(0))
    value = torch.mul(q, log_q.sub_(log_p), out=log_p).sum(-1)
    log_q.sub_(value[:, None]).mul_(q)
    return value


def tvd(log_p: Tensor, log_q: Tensor, spare: Spare) -> Tensor:
    """Half the sum of |p - q|: g = q sign(q - p) / 2."""
    sign = log_p.exp_()
    q = log_q.exp_()
    value = torch.abs(sign.sub_(q), out=spare(0)).sum(-1) / 2  # p - q
    half = sign.sign_().mul_(-0.5)
    q.mul_(half.sub_(torch.mul(q, half, out=spare(0)).sum(-1, keepdim=True)))
    return value


def jsd(log_p: Tensor, log_q: Tensor, spare: Spare, *, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: g = (1 - beta) q log(q /
    m).
    """
    if beta == 0:
        return fkl(log_p, log_q, spare)
    if beta == 1:
        return rkl(log_p, log_q, spare)
    p, q = torch.exp(log_p, out=spare(0)), torch.exp(log_q, out=spare(1))
    log_m = _log_(torch.mul(p, beta, out=spare(2)).add_(q, alpha=1 - beta))
    first = log_p.sub_(log_m).mul_(p).sum(-1)
    second = torch.mul(q, log_q.sub_(log_m), out=log_p).sum(-1)  # log_q is now log(q / m)
    log_q.sub_(second[:, None]).mul_(q).mul_(1 - beta)
    return beta * first + (1 - beta) * second


def skl(log_p: Tensor, log_q: Tensor, spare: Spare, *, skew: float) -> Tensor:
    """KL(p || m), m = skew p + (1 - skew) q: g = -(1 - skew) p q / m."""
    if skew == 0:
        return fkl(log_p, log_q, spare)
    if skew == 1:
        log_q.zero_()
        return log_p.new_zeros(len(log_p))
    p, q = torch.exp(log_p, out=spare(0)), torch.exp(log_q, out=spare(1))
    log_m = _log_(torch.mul(p, skew, out=spare(2)).add_(q, alpha=1 - skew))
    value = torch.mul(p, log_p.sub_(log_m), out=log_m).sum(-1)  # log_p is now log(p / m)
    weight = log_p.exp_().mul_(skew - 1)  # -(1 - skew) p / m, finite: p / m is at most 1 / skew
    log_q.copy_(weight.sub_(torch.mul(q, weight, out=log_m).sum(-1, keepdim=True))).mul_(q)
    return value


def srkl(
    log_p: Tensor, log_q: Tensor, spare: Spare, *, skew: float, detach_mixture: bool
) -> Tensor:
    """KL(q || m), m = (1 - skew) p + skew q: g = q (log(q / m) + 1 - skew q / m), the last term not
    where m is detached.
    """
    if skew == 0:
        return rkl(log_p, log_q, spare)
    p, q = torch.exp(log_p, out=spare(0)), torch.exp(log_q, out=spare(1))
    log_m = _log_(p.mul_(1 - skew).add_(q, alpha=skew))
    log_q.sub_(log_m)  # log(q / m)
    value = torch.mul(q, log_q, out=log_p).sum(-1)
    if not detach_mixture:
        ratio = log_m.copy_(log_q).exp_()  # q / m, at most 1 / skew
        log_q.sub_(ratio, alpha=skew)
    log_q.sub_(torch.mul(q, log_q, out=log_p).sum(-1, keepdim=True)).mul_(q)
    return value


def _log_(mixture: Tensor) -> Tensor:
    """Logarithm in place. Where both parts underflowed it stays finite, and is multiplied by their
    0.
    """
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()


CLOSED: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (fkl, rkl, tvd, jsd, skl, srkl)
}
