"""What the loss reads of each loss token beside its logits: label, weights and place.

Shapes: n loss tokens of B samples.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pocl_ds.data.batches import position_in_sample
from pocl_ds.errors import RecipeError


@dataclass(frozen=True)
class TokenInputs:
    """One value for each of n loss tokens; None where the loss needs none.

    labels: int64. weights: factor of the token's complete loss, from its sample and from whether it
    belongs to a thought (docs/method.md, eq. 28 and 34). span_weights: factors of the
    cross-entropy's gradient in place of the SFT ratio, which turn it into that of a loss over
    spans; they include `weights`. position: 0 at the first loss token of the sample to 1 at its
    last; only for a token rule.
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
        token_weights: Tensor | None = None,
        with_position: bool = False,
        positions: Tensor | None = None,
    ) -> TokenInputs:
        """The tokens of B samples. sample_of_token: [n] int64, None if all tokens are of one
        sample. sample_weights: [B], None for 1. dtype: of the computation. token_weights: [n],
        further factors; None for 1. positions: [n], if the tokens are not all of their samples.

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
        if token_weights is not None:
            own = token_weights.detach().to(labels.device, dtype)
            weights = own if weights is None else weights * own
        if with_position:
            position = (
                position_in_sample(sample_of_token, dtype)
                if positions is None
                else positions.to(dtype)
            )
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
