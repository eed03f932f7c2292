"""Divergences as functions of plain tensors: logits in, a loss out. They need no recipe and no run.

Every function takes the student's logits first, as TRL and Liger do, and the same keywords:

student_logits, teacher_logits: [..., ids], any floating type. An id whose logit is -inf on both
sides adds exactly 0 to value and gradient. The computation is in float32, or in float64 for
float64 logits.

temperature: tau > 0; both sides' logits are divided by it.

mask: [...] bool, True where a token counts. None: every token counts.

reduction: "mean" over the tokens that count (a scalar), "sum" over them (a scalar), or "none" (one
value per token [...], 0 where mask is False).

scale_by_temperature_squared: multiplies the result by temperature^2, so that gradients keep their
size as the temperature rises (Hinton et al., arXiv 1503.02531).

Values are in nats per token. Every function raises RecipeError for an option that is out of range
and ValueError for shapes that do not match. The formulas are in `divergences`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pocl_ds.config.registry import CROSS_TOKENIZER_LOSSES
from pocl_ds.errors import RecipeError
from pocl_ds.losses import cross_tokenizer
from pocl_ds.losses.divergences import (
    DIVERGENCES,
    compute_dtype,
    divergence_options,
    log_probabilities,
)

Reduction: TypeAlias = Literal["none", "mean", "sum"]


def divergence(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
    **options: Any,
) -> Tensor:
    """The divergence of this name between teacher and student (docs/method.md, eq. 11 to 18).

    name: `fkl`, `rkl`, `jsd`, `tvd`, `skl`, `srkl`, `akl`, `ab`, a name that a plugin registered,
    or `sft`, whose divergence is 0. options: those of the divergence, for example `skew=0.1`; see
    `config.registry.LOSSES`. The other arguments: see the module.

    Raises RecipeError for an unknown name or option, a value out of range, or a loss between
    tokenizers, which is not a function of two rows of logits (see `uld` and `alm`).
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence(name, student_logits, teacher_logits, settings, **options)


def fkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Forward KL divergence KL(p || q) (docs/method.md, eq. 11). Arguments: see the module."""
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence("fkl", student_logits, teacher_logits, settings)


def rkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Reverse KL divergence KL(q || p) (MiniLLM, arXiv 2306.08543; docs/method.md, eq. 12).

    Arguments: see the module.
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence("rkl", student_logits, teacher_logits, settings)


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649; docs/method.md, eq. 13).

    beta: weight of the teacher in the mixture, 0 to 1; 0 and 1 mean forward and reverse KL, as in
    TRL's `generalized_jsd_loss`. Other arguments: see the module.
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence("jsd", student_logits, teacher_logits, settings, beta=beta)


def tvd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Total variation distance (f-distill, arXiv 2307.15190; docs/method.md, eq. 14).

    Arguments: see the module.
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence("tvd", student_logits, teacher_logits, settings)


def skl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Skewed KL divergence (DistiLLM, arXiv 2402.03898; docs/method.md, eq. 15).

    skew: weight of the teacher in the mixture, 0 to 1. Other arguments: see the module.
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence("skl", student_logits, teacher_logits, settings, skew=skew)


def srkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    detach_mixture: bool = False,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Skewed reverse KL divergence (DistiLLM, arXiv 2402.03898; docs/method.md, eq. 16).

    skew: weight of the student in the mixture, 0 to 1. detach_mixture: stop the gradient through
    the mixture. Other arguments: see the module.
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence(
        "srkl", student_logits, teacher_logits, settings, skew=skew, detach_mixture=detach_mixture
    )


def akl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Adaptive KL divergence (arXiv 2404.02657; docs/method.md, eq. 17).

    mu: largest total probability of the teacher's head, 0 to 1. Other arguments: see the module.
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence("akl", student_logits, teacher_logits, settings, mu=mu)


def ab(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    ab_alpha: float = 0.2,
    ab_beta: float = 0.7,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Alpha-beta divergence (ABKD, arXiv 2505.04560; docs/method.md, eq. 18).

    ab_alpha, ab_beta: exponents of p and of q, of any sign. Other arguments: see the module.
    """
    settings = (temperature, mask, reduction, scale_by_temperature_squared)
    return _divergence(
        "ab", student_logits, teacher_logits, settings, ab_alpha=ab_alpha, ab_beta=ab_beta
    )


def uld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Universal logit distillation loss between two vocabularies (arXiv 2402.12030; docs/method.md,
    eq. 20).

    student_logits: [..., ids]; teacher_logits: [..., teacher_ids], for the tokens that follow the
    same text. Other arguments: see the module.
    """
    _check_temperature(temperature)
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)}: all dimensions but the last must be equal"
        )
    dtype = compute_dtype(student_logits.dtype)
    p, q = (
        (logits.to(dtype) / temperature).softmax(-1).sort(-1, descending=True).values
        for logits in (teacher_logits, student_logits)
    )
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(side, (0, width - side.shape[-1])) for side in (p, q))
    value = (p - q).abs().sum(-1)
    if scale_by_temperature_squared:
        value = value * temperature**2
    return _reduce(value, mask, reduction)


def alm(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    scale_by_temperature_squared: bool = True,
) -> Tensor:
    """Approximate likelihood matching of spans of text (arXiv 2503.20083; docs/method.md, eq. 21).

    student_log_probs, teacher_log_probs: [...] log-probability that a model writes a span, the
    sum over the span's tokens at temperature 1. Other arguments: see the module, with spans in
    place of tokens.
    """
    _check_temperature(temperature)
    if student_log_probs.shape != teacher_log_probs.shape:
        raise ValueError(
            f"student_log_probs has shape {tuple(student_log_probs.shape)} and teacher_log_probs "
            f"{tuple(teacher_log_probs.shape)}: give one value per span on both sides"
        )
    dtype = compute_dtype(student_log_probs.dtype)
    value = cross_tokenizer.alm(
        teacher_log_probs.to(dtype), student_log_probs.to(dtype), temperature
    )
    if scale_by_temperature_squared:
        value = value * temperature**2
    return _reduce(value, mask, reduction)


def _divergence(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    settings: tuple[float, Tensor | None, Reduction, bool],
    **options: Any,
) -> Tensor:
    """`divergence`; settings: temperature, mask, reduction, scale_by_temperature_squared."""
    temperature, mask, reduction, scale_by_temperature_squared = settings
    complete = divergence_options(name, options)
    if name in CROSS_TOKENIZER_LOSSES:
        raise RecipeError(
            f"{name} compares texts, not ids: it has no value for two rows of logits over the same "
            f"ids"
        )
    _check_temperature(temperature)
    dtype = compute_dtype(student_logits.dtype)
    if name == "sft":
        zero = torch.zeros(student_logits.shape[:-1], dtype=dtype, device=student_logits.device)
        return _reduce(zero, mask, reduction)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)}: give both the same shape [..., ids]"
        )
    log_p = log_probabilities(teacher_logits, temperature, dtype)
    log_q = log_probabilities(student_logits, temperature, dtype)
    value = DIVERGENCES[name](log_p, log_q, **complete)
    # Rounding can end slightly below zero. The value is clamped; the gradient stays that of the
    # formula.
    value = value + (value.clamp(min=0) - value).detach()
    if scale_by_temperature_squared:
        value = value * temperature**2
    return _reduce(value, mask, reduction)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise RecipeError(f"temperature={temperature:g}: a temperature must be greater than 0")


def _reduce(value: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """Reduce one value per token [...]; a mean without any token is 0."""
    if mask is not None:
        if mask.shape != value.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}: give one flag per token, {tuple(value.shape)}"
            )
        # where, not a product: a token that does not count may hold a NaN.
        value = torch.where(mask.bool(), value, torch.zeros_like(value))
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    if reduction == "mean":
        tokens = value.numel() if mask is None else int(mask.sum())
        return value.sum() / max(tokens, 1)
    raise ValueError(f"reduction={reduction!r}: choose none, mean or sum")
