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
    turn it into that of a loss over spans; they include `weights`.
    """

    labels: Tensor
    weights: Tensor | None = None
    span_weights: Tensor | None = None

    @classmethod
    def of_samples(
        cls,
        labels: Tensor,
        sample_of_token: Tensor | None,
        sample_weights: Tensor | None,
        dtype: torch.dtype,
    ) -> TokenInputs:
        """The tokens of B samples whose losses have weights. sample_of_token: [n] int64, None if
        all tokens are of one sample. sample_weights: [B]. dtype: of the computation.

        Raises RecipeError for weights without one number per sample.
        """
        if sample_weights is None:
            return cls(labels)
        if sample_weights.ndim != 1 or (sample_of_token is None and len(sample_weights) != 1):
            raise RecipeError(
                f"sample_weights has shape {tuple(sample_weights.shape)}: give one number per "
                "sample, and sample_of_token for more than one"
            )
        weights = sample_weights.detach().to(labels.device, dtype)
        if sample_of_token is None:
            return cls(labels, weights.expand(len(labels)))
        return cls(labels, weights[sample_of_token])

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
