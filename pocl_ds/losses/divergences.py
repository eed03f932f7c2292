"""Divergences between the next-token distributions of a teacher and a student.

A divergence is one function below, from log-probabilities [..., ids] of both sides to one value
per token [...], and one line in `config.registry.LOSSES` with its options and their defaults.
Values are true divergences: at least 0, and 0 where both distributions agree.

Letters, as in docs/method.md:

    p, q            next-token distribution of the teacher and of the student
    z_p, z_q        their logits; p = softmax(z_p / tau), q = softmax(z_q / tau)
    log_p, log_q    natural logarithms of p and q
    m, log_m        a mixture of p and q, and its logarithm
    tau             temperature (`temperature` in recipes and signatures)
    alpha           SFT ratio (`sft_ratio`), the weight of the cross-entropy term
    a, b            the two exponents of the alpha-beta divergence (`ab_alpha`, `ab_beta`)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pocl_ds.config.consistency import option_problem
from pocl_ds.config.registry import LOSSES
from pocl_ds.errors import RecipeError

# The log-probability of a masked id (logit -inf). Its probability underflows to exactly 0 in
# float32 and float64, while products with 0 and differences between both sides stay finite.
MASKED = -1e30


def fkl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward KL divergence KL(p || q) (docs/method.md, eq. 11)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rkl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Reverse KL divergence KL(q || p) (MiniLLM, arXiv 2306.08543; docs/method.md, eq. 12)."""
    return fkl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q (GKD, arXiv 2306.13649; docs/method.md, eq. 13).

    beta = 0 means forward KL and beta = 1 reverse KL: the limits of the divergence divided by
    beta and by 1 - beta, as in TRL.
    """
    if beta == 0:
        return fkl(log_p, log_q)
    if beta == 1:
        return rkl(log_p, log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * fkl(log_p, log_m) + (1 - beta) * fkl(log_q, log_m)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance, half the sum of |p - q| (f-distill, arXiv 2307.15190;
    docs/method.md, eq. 14).
    """
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def skl(log_p: Tensor, log_q: Tensor, *, skew: float) -> Tensor:
    """Skewed KL divergence KL(p || skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898;
    docs/method.md, eq. 15).
    """
    return fkl(log_p, _log_mixture(log_p, log_q, skew))


def srkl(log_p: Tensor, log_q: Tensor, *, skew: float, detach_mixture: bool) -> Tensor:
    """Skewed reverse KL divergence KL(q || (1 - skew) p + skew q) (DistiLLM; docs/method.md, eq.
    16).

    The gradient flows through q in both places; `detach_mixture` stops it in the mixture.
    """
    log_m = _log_mixture(log_q, log_p, skew)
    return fkl(log_q, log_m.detach() if detach_mixture else log_m)


def akl(log_p: Tensor, log_q: Tensor, *, mu: float) -> Tensor:
    """Adaptive KL divergence: forward and reverse KL, weighted by the gap |p - q| over the
    teacher's head and tail (arXiv 2404.02657; docs/method.md, eq. 17).

    The head is the longest run of the teacher's most probable ids whose probabilities sum to at
    most mu; the most probable id always belongs to it.
    """
    with torch.no_grad():
        # Sort ids by the teacher's probability and mark the head.
        p, q = log_p.exp(), log_q.exp()
        sorted_p, ids = p.sort(dim=-1, descending=True, stable=True)
        in_head = sorted_p.cumsum(-1) <= mu
        in_head[..., 0] = True
        # The forward KL's weight is the head's share of the total gap.
        gap = (p - q).abs().gather(-1, ids)
        head_gap, total_gap = (gap * in_head).sum(-1), gap.sum(-1)
        weight = head_gap / total_gap.clamp(min=torch.finfo(total_gap.dtype).tiny)
    mixed = weight * fkl(log_p, log_q) + (1 - weight) * rkl(log_p, log_q)
    return torch.where(total_gap > 0, mixed, torch.zeros_like(mixed))


def ab(log_p: Tensor, log_q: Tensor, *, ab_alpha: float, ab_beta: float) -> Tensor:
    """Alpha-beta divergence, with its limits where a, b or a + b is 0 (ABKD, arXiv 2505.04560;
    Cichocki et al. 2011; docs/method.md, eq. 18).
    """
    a, b = ab_alpha, ab_beta
    if a == 0 and b == 0:
        return 0.5 * (log_q - log_p).square().sum(-1)
    if a == 0:
        return _one_exponent(log_q, log_p, b)
    if b == 0:
        return _one_exponent(log_p, log_q, a)
    if a + b == 0:
        ratio = a * (log_q - log_p)
        return (ratio + (-ratio).exp() - 1).sum(-1) / a**2
    total = a + b
    terms = (
        (a * log_p + b * log_q).exp()
        - a / total * (total * log_p).exp()
        - b / total * (total * log_q).exp()
    )
    return -terms.sum(-1) / (a * b)


def _one_exponent(log_x: Tensor, log_y: Tensor, c: float) -> Tensor:
    """The alpha-beta divergence where only one exponent, c, is not 0."""
    x = (c * log_x).exp()
    return (x * (c * (log_x - log_y)) - x + (c * log_y).exp()).sum(-1) / c**2


def _log_mixture(log_x: Tensor, log_y: Tensor, weight: float) -> Tensor:
    """log(weight x + (1 - weight) y)."""
    if weight == 0:
        return log_y
    if weight == 1:
        return log_x
    return torch.logaddexp(log_x + math.log(weight), log_y + math.log1p(-weight))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (fkl, rkl, jsd, tvd, skl, srkl, akl, ab)
}


def divergence_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a divergence: its defaults, overridden by `options`.

    Raises RecipeError for an unknown name or option, or a value out of range.
    """
    if name not in LOSSES:
        raise RecipeError(f"there is no divergence {name!r}: choose one of {', '.join(LOSSES)}")
    for option in options:
        if option not in LOSSES[name]:
            known = ", ".join(LOSSES[name]) or "no options"
            raise RecipeError(f"{name} has no option {option!r}: it has {known}")
    complete = {**LOSSES[name], **options}
    if problem := option_problem(name, complete):
        raise RecipeError(problem)
    return complete


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computations on logits: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_probabilities(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(logits / temperature) in `dtype`, with MASKED where a logit is -inf.

    logits: [..., ids]; the result has the same shape.
    """
    scaled = logits.to(dtype)
    if temperature != 1.0:
        scaled = scaled / temperature
    return scaled.log_softmax(-1).masked_fill(logits == -math.inf, MASKED)
