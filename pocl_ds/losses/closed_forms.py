"""Divergences with a known gradient in the student's logits: value and gradient computed in place.

The values equal those of the functions of the same names in `divergences`, which build an autograd
graph; tests hold both equal. Without a graph a block of tokens needs half the memory and half the
passes. A divergence that is missing here goes through autograd.

Each function takes log_p and log_q [tokens, ids], both of which it may overwrite, and up to three
more buffers of their shape, `buffer(0)` to `buffer(2)`. It returns one value per token and leaves
in log_q the gradient of that value in the logits whose log-softmax log_q was. With g = dD / d
log_q that gradient is g - q sum(g). A masked id holds `divergences.MASKED` on both sides and gets
exactly 0. Letters: see `divergences`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Buffer: TypeAlias = Callable[[int], Tensor]


def fkl(log_p: Tensor, log_q: Tensor, buffer: Buffer) -> Tensor:
    """KL(p || q), docs/method.md, eq. 11: gradient q - p."""
    p = torch.exp(log_p, out=buffer(0))
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    log_q.exp_().sub_(p)
    return value


def rkl(log_p: Tensor, log_q: Tensor, buffer: Buffer) -> Tensor:
    """KL(q || p), docs/method.md, eq. 12: gradient q (log q - log p - KL)."""
    q = torch.exp(log_q, out=buffer(0))
    value = torch.mul(q, log_q.sub_(log_p), out=log_p).sum(-1)
    log_q.sub_(value[:, None]).mul_(q)
    return value


def tvd(log_p: Tensor, log_q: Tensor, buffer: Buffer) -> Tensor:
    """Half the sum of |p - q|, docs/method.md, eq. 14: g = q sign(q - p) / 2."""
    sign = log_p.exp_()
    q = log_q.exp_()
    value = torch.abs(sign.sub_(q), out=buffer(0)).sum(-1) / 2  # p - q
    half_sign = sign.sign_().mul_(-0.5)
    q.mul_(half_sign.sub_(torch.mul(q, half_sign, out=buffer(0)).sum(-1, keepdim=True)))
    return value


def jsd(log_p: Tensor, log_q: Tensor, buffer: Buffer, *, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, docs/method.md, eq.
    13: g = (1 - beta) q log(q / m).
    """
    if beta == 0:
        return fkl(log_p, log_q, buffer)
    if beta == 1:
        return rkl(log_p, log_q, buffer)
    p, q = torch.exp(log_p, out=buffer(0)), torch.exp(log_q, out=buffer(1))
    log_m = _log_(torch.mul(p, beta, out=buffer(2)).add_(q, alpha=1 - beta))
    teacher_term = log_p.sub_(log_m).mul_(p).sum(-1)
    student_term = torch.mul(q, log_q.sub_(log_m), out=log_p).sum(-1)  # log_q is now log(q / m)
    log_q.sub_(student_term[:, None]).mul_(q).mul_(1 - beta)
    return beta * teacher_term + (1 - beta) * student_term


def skl(log_p: Tensor, log_q: Tensor, buffer: Buffer, *, skew: float) -> Tensor:
    """KL(p || m) with m = skew p + (1 - skew) q, docs/method.md, eq. 15:
    g = -(1 - skew) p q / m.
    """
    if skew == 0:
        return fkl(log_p, log_q, buffer)
    if skew == 1:
        log_q.zero_()
        return log_p.new_zeros(len(log_p))
    p, q = torch.exp(log_p, out=buffer(0)), torch.exp(log_q, out=buffer(1))
    log_m = _log_(torch.mul(p, skew, out=buffer(2)).add_(q, alpha=1 - skew))
    value = torch.mul(p, log_p.sub_(log_m), out=log_m).sum(-1)  # log_p is now log(p / m)
    weight = log_p.exp_().mul_(skew - 1)  # -(1 - skew) p / m, finite: p / m is at most 1 / skew
    log_q.copy_(weight.sub_(torch.mul(q, weight, out=log_m).sum(-1, keepdim=True))).mul_(q)
    return value


def srkl(
    log_p: Tensor, log_q: Tensor, buffer: Buffer, *, skew: float, detach_mixture: bool
) -> Tensor:
    """KL(q || m) with m = (1 - skew) p + skew q, docs/method.md, eq. 16:
    g = q (log(q / m) + 1 - skew q / m), without the last term if m is detached.
    """
    if skew == 0:
        return rkl(log_p, log_q, buffer)
    p, q = torch.exp(log_p, out=buffer(0)), torch.exp(log_q, out=buffer(1))
    log_m = _log_(p.mul_(1 - skew).add_(q, alpha=skew))
    log_q.sub_(log_m)  # log(q / m)
    value = torch.mul(q, log_q, out=log_p).sum(-1)
    if not detach_mixture:
        ratio = log_m.copy_(log_q).exp_()  # q / m, at most 1 / skew
        log_q.sub_(ratio, alpha=skew)
    log_q.sub_(torch.mul(q, log_q, out=log_p).sum(-1, keepdim=True)).mul_(q)
    return value


def ab(log_p: Tensor, log_q: Tensor, buffer: Buffer, *, ab_alpha: float, ab_beta: float) -> Tensor:
    """Alpha-beta divergence, docs/method.md, eq. 18: g = (q^(a + b) - p^a q^b) / a, and in the
    limit of a = 0 q^b (log q - log p).
    """
    a, b = ab_alpha, ab_beta
    if a == 0:
        value, g = _alpha_zero(log_p, log_q, buffer, b)
    else:
        # As a log(p / q) + (a + b) log q, in which MASKED cancels where a + b is 0.
        cross = torch.sub(log_p, log_q, out=buffer(0)).mul_(a).add_(log_q, alpha=a + b).exp_()
        power = torch.mul(log_q, a + b, out=buffer(1)).exp_()
        if b == 0:
            terms = log_p.sub_(log_q).mul_(a).sub_(1).mul_(cross).add_(power).div_(a * a)
        elif a + b == 0:
            terms = log_p.sub_(log_q).mul_(-a).add_(cross).sub_(1).div_(a * a)
        else:
            teacher_power = log_p.mul_(a + b).exp_()
            terms = teacher_power.mul_(a / (a + b)).add_(power, alpha=b / (a + b))
            terms.sub_(cross).div_(a * b)
        value, g = terms.sum(-1), power.sub_(cross).div_(a)
    log_q.exp_().mul_(g.sum(-1, keepdim=True))
    torch.sub(g, log_q, out=log_q)
    return value


def _alpha_zero(log_p: Tensor, log_q: Tensor, buffer: Buffer, b: float) -> tuple[Tensor, Tensor]:
    """The alpha-beta divergence at a = 0, and g in buffer(0)."""
    g = torch.sub(log_q, log_p, out=buffer(0))
    if b == 0:
        return torch.mul(g, g, out=buffer(1)).sum(-1) / 2, g
    power = torch.mul(log_q, b, out=buffer(1)).exp_()
    g.mul_(power)
    terms = log_p.mul_(b).exp_().sub_(power).add_(g, alpha=b)
    return terms.sum(-1) / b**2, g


def _log_(mixture: Tensor) -> Tensor:
    """The logarithm, in place. It stays finite where both parts underflowed; they multiply it by
    0.
    """
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()


CLOSED_FORMS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (fkl, rkl, tvd, jsd, skl, srkl, ab)
}
