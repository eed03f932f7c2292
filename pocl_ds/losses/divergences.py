"""Divergences between teacher p and student q over the next token (METHOD 3).

A divergence is one function below, from the log-probabilities of both sides `[tokens, ids]` to one
value a token, and one line in `names.LOSSES` with its options. All arithmetic is float32 or
float64. Values are the true divergences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pocl_ds.config.consistency import out_of_range
from pocl_ds.config.registry import ACROSS_TOKENIZERS, LOSSES
from pocl_ds.errors import RecipeError

# The log-probability of an id that is masked (-inf). Its probability underflows to exactly 0 in
# float32 and float64, while products with 0 and differences between both sides stay finite.
MASKED = -1e30


def divergence(
    name: str,
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    **options: Any,
) -> Tensor:
    """Divergence a token between two rows of logits.

    teacher_logits, student_logits: [tokens, ids], any float type; an id that is -inf on both sides
    adds exactly zero to value and gradient. tau divides both. scale_by_temperature_squared multiplies the result by
    tau^2, so that gradients keep their size as tau rises (Hinton et al., arXiv 1503.02531).
    options: see `names.LOSSES`. `sft` never asks the teacher: 0. Returns [tokens], float32, or
    float64 where the student's logits are. Raises RecipeError for an unknown name, option or a
    value out of range.
    """
    chosen = divergence_options(name, options)
    if name in ACROSS_TOKENIZERS:
        raise RecipeError(f"{name} compares texts, not ids: it has no value for two rows of logits")
    if temperature <= 0:
        raise RecipeError(f"temperature={temperature:g}: a temperature must be greater than 0")
    if name == "sft":
        return torch.zeros(
            student_logits.shape[:-1],
            dtype=working_type(student_logits.dtype),
            device=student_logits.device,
        )
    log_p = log_probabilities(teacher_logits, temperature, working_type(student_logits.dtype))
    log_q = log_probabilities(student_logits, temperature, working_type(student_logits.dtype))
    value = FUNCTIONS[name](log_p, log_q, **chosen)
    # Rounding can end a hair below zero. The value is mended, the gradient stays that of the
    # formula.
    value = value + (value.clamp(min=0) - value).detach()
    return value * temperature**2 if scale_by_temperature_squared else value


def divergence_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a divergence, given ones over defaults. Raises RecipeError where one is
    unknown or out of range.
    """
    if name not in LOSSES:
        raise RecipeError(f"there is no divergence {name!r}: take one of {', '.join(LOSSES)}")
    for option in options:
        if option not in LOSSES[name]:
            known = ", ".join(LOSSES[name]) or "no options"
            raise RecipeError(f"{name} has no option {option!r}: it has {known}")
    chosen = {**LOSSES[name], **options}
    if fault := out_of_range(name, chosen):
        raise RecipeError(fault)
    return chosen


def working_type(dtype: torch.dtype) -> torch.dtype:
    """What logits of a type are computed in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_probabilities(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(logits / tau) in `dtype`, with MASKED where a logit is -inf."""
    scaled = logits.to(dtype)
    if temperature != 1.0:
        scaled = scaled / temperature
    return scaled.log_softmax(-1).masked_fill(logits == -math.inf, MASKED)


def fkl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward KL(p || q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rkl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Reverse KL(q || p) (MiniLLM, arXiv 2306.08543)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta)
    q (GKD, arXiv 2306.13649).

    beta = 0 and 1 mean forward and reverse KL, the limits of the divergence over beta and over 1 -
    beta.
    """
    if beta == 0:
        return fkl(log_p, log_q)
    if beta == 1:
        return rkl(log_p, log_q)
    log_m = _mixture(log_p, log_q, beta)
    return beta * fkl(log_p, log_m) + (1 - beta) * fkl(log_q, log_m)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation: half the sum of |p - q| (f-distill, arXiv 2307.15190)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def skl(log_p: Tensor, log_q: Tensor, *, skew: float) -> Tensor:
    """Skew KL(p || skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898)."""
    return fkl(log_p, _mixture(log_p, log_q, skew))


def srkl(log_p: Tensor, log_q: Tensor, *, skew: float, detach_mixture: bool) -> Tensor:
    """Skew reverse KL(q || (1 - skew) p + skew q) (DistiLLM). The gradient flows through q in both
    places.
    """
    log_m = _mixture(log_q, log_p, skew)
    return fkl(log_q, log_m.detach() if detach_mixture else log_m)


def akl(log_p: Tensor, log_q: Tensor, *, mu: float) -> Tensor:
    """Adaptive KL: forward and reverse KL, weighed by the gap |p - q| over the teacher's head and
    tail (arXiv 2404.02657).

    Head: the longest run of the teacher's top ids whose probabilities sum to at most mu; the first
    is always in.
    """
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        top, ids = p.sort(dim=-1, descending=True, stable=True)
        in_head = top.cumsum(-1) <= mu
        in_head[..., 0] = True
        gap = (p - q).abs().gather(-1, ids)
        head = (gap * in_head).sum(-1)
        total = gap.sum(-1)
        weight = torch.where(
            total > 0,
            head / total.clamp(min=torch.finfo(total.dtype).tiny),
            torch.zeros_like(total),
        )
    mixed = weight * fkl(log_p, log_q) + (1 - weight) * rkl(log_p, log_q)
    return torch.where(total > 0, mixed, torch.zeros_like(mixed))


def ab(log_p: Tensor, log_q: Tensor, *, ab_alpha: float, ab_beta: float) -> Tensor:
    """Alpha-beta divergence (ABKD, arXiv 2505.04560; Cichocki et al. 2011), with its limits where a
    factor vanishes.
    """
    a, b = ab_alpha, ab_beta
    if a == 0 and b == 0:
        return 0.5 * (log_q - log_p).square().sum(-1)
    if a == 0:
        return (
            (b * log_q).exp() * (b * (log_q - log_p)) - (b * log_q).exp() + (b * log_p).exp()
        ).sum(-1) / b**2
    if b == 0:
        return (
            (a * log_p).exp() * (a * (log_p - log_q)) - (a * log_p).exp() + (a * log_q).exp()
        ).sum(-1) / a**2
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


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    if share == 0:
        return log_q
    if share == 1:
        return log_p
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (fkl, rkl, jsd, tvd, skl, srkl, akl, ab)
}
