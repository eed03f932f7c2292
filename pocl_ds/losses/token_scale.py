"""How the divergence of each token enters the loss: its temperature and its factors.

Shapes: n tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_rules import TokenSignals, count_invalid

if TYPE_CHECKING:
    from pocl_ds.losses.token_losses import LossTerms


@dataclass(frozen=True)
class TokenScale:
    """One number for all tokens, or [n].

    temperature: divides the logits of both sides. kd_factor: factor of the divergence.
    kd_weights: further factors, in the total and in the gradient alone; None for 1. invalid: see
    `count_invalid`; None for a rule that is not checked.
    """

    temperature: float | Tensor
    kd_factor: float | Tensor
    kd_weights: Tensor | None
    invalid: Tensor | None = None

    @classmethod
    def of(
        cls, terms: LossTerms, tokens: TokenInputs, signals: TokenSignals | None, like: Tensor
    ) -> TokenScale:
        """The scale of these tokens. signals: None without a token rule. like: a tensor on the
        device and in the type of the computation.
        """
        if terms.token_rule is None or signals is None:
            return cls(terms.temperature, terms.kd_factor, tokens.weights)
        factors = terms.token_rule(signals, tokens.labels, like.dtype)
        invalid = count_invalid(factors, like) if terms.token_rule.is_checked else None
        weights = factors.weight
        if weights is None or tokens.weights is None:
            weights = tokens.weights if weights is None else weights
        else:
            weights = weights * tokens.weights
        if factors.temperature is None:
            return cls(terms.temperature, terms.kd_factor, weights, invalid)
        temperature = terms.temperature * factors.temperature
        squared = terms.scale_by_temperature_squared
        kd_factor = temperature.square() if squared else 1.0
        return cls(temperature, kd_factor, weights, invalid)

    def gradient_factor(self, terms: LossTerms) -> float | Tensor:
        """The factor of the divergence's gradient in the logits at the token's temperature."""
        factor = (1 - terms.ce_weight) * self.kd_factor / self.temperature
        return factor if self.kd_weights is None else factor * self.kd_weights

    def sums(self, values: Tensor, tokens: TokenInputs, count: int) -> Tensor:
        """The first `count` sums of `LogitLoss`. values: [2, n], the divergence and the
        cross-entropy of each token.
        """
        kd_factor = self.kd_factor
        if isinstance(kd_factor, Tensor):
            values, kd_factor = torch.stack([values[0] * kd_factor, values[1]]), 1.0
        kd, ce = values.sum(1).unbind()
        sums = [kd * kd_factor, ce]
        if count > 2:
            weights = self.kd_weights, tokens.weights
            kd, ce = (
                plain if weight is None else (value * weight).sum()
                for plain, value, weight in zip((kd, ce), values, weights, strict=True)
            )
            sums += [kd * kd_factor, ce]
        if count > 4:
            sums += (kd.new_zeros(2) if self.invalid is None else self.invalid).unbind()
        return torch.stack(sums)
