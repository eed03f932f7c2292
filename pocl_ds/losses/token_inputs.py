"""What the loss reads of each loss token beside its logits: label, weights and place.

Shapes: n loss tokens of B samples.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pocl_ds.errors import RecipeError


@dataclass(frozen=True)
class TokenInputs:
    """One value for each of n loss tokens; None where the loss needs none.

    labels: int64. weights: factor of the token's complete loss, from its sample (docs/method.md,
    eq. 28). span_weights: factors of the cross-entropy's gradient in place of the SFT ratio, which
    turn it into that of a loss over spans; they include `weights`. position: 0 at the first loss
    token of the sample to 1 at its last; only for a token rule.
    """

    labels: Tensor
    weights: Tensor | None = None
    span_weights: Tensor | None = None
    position: Tensor | None = None

    @classmethod
    def of_samples(
        cls,
        labels: Tensor,
        sample_of_token: Tensor | None,
        sample_weights: Tensor | None,
        dtype: torch.dtype,
        *,
        with_position: bool = False,
    ) -> TokenInputs:
        """The tokens of B samples. sample_of_token: [n] int64, None if all tokens are of one
        sample. sample_weights: [B], None for 1. dtype: of the computation.

        Raises RecipeError for weights without one number per sample.
        """
        weights = position = None
        if sample_of_token is None:
            if sample_weights is not None and sample_weights.shape != (1,):
                raise RecipeError(
                    f"sample_weights has shape {tuple(sample_weights.shape)}, and the tokens are "
                    "of one sample: give one number, or sample_of_token"
                )
            sample_of_token = torch.zeros_like(labels)
        if sample_weights is not None:
            if sample_weights.ndim != 1:
                raise RecipeError(
                    f"sample_weights has shape {tuple(sample_weights.shape)}: give one number per "
                    "sample"
                )
            weights = sample_weights.detach().to(labels.device, dtype)[sample_of_token]
        if with_position:
            position = _position(sample_of_token, dtype)
        return cls(labels, weights, position=position)

    def __getitem__(self, tokens: slice) -> TokenInputs:
        """The same values of some of the tokens."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: value[tokens] for name, value in values.items() if value is not None}
        )

    def __len__(self) -> int:
        return len(self.labels)

    def ce_weight(self, sft_ratio: float) -> float | Tensor:
        """The weight of each token's cross-entropy in the gradient: one number, or [n]."""
        if self.span_weights is not None:
            return self.span_weights
        if self.weights is None or sft_ratio == 0:
            return sft_ratio
        return sft_ratio * self.weights


def place_in_sample(samples: Tensor) -> Tensor:
    """[n]: the index of each loss token among those of its sample. samples: [n], the sample of each
    token; the tokens of a sample follow one another.
    """
    index = torch.arange(len(samples), device=samples.device)
    if not len(samples):
        return index
    is_start = torch.cat([samples.new_full((1,), -1), samples[:-1]]) != samples
    return index - torch.cummax(torch.where(is_start, index, 0), 0).values


def _position(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """[n]: 0 at the first token of each sample to 1 at its last; 0 if it is the only one."""
    before, after = place_in_sample(samples), place_in_sample(samples.flip(0)).flip(0)
    return before.to(dtype) / (before + after).clamp(min=1)
