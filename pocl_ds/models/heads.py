"""A causal language model in two parts: the backbone up to its last hidden states, and the output
head that makes logits.

Distillation needs logits at loss positions only, and in chunks, so it applies the head itself. What
a family does after the head's matrix (a scale, a soft cap) is listed here by family.

Shapes: B sequences, T positions, D width of the head's input, V vocabulary rows, n positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from pocl_ds.compat.deepspeed_private import full_shape
from pocl_ds.compat.transformers_private import attn_implementation, is_quantized
from pocl_ds.errors import ModelError
from pocl_ds.models.attention import FAMILIES, PER_SAMPLE
from pocl_ds.models.packed_samples import PackedSamples
from pocl_ds.models.rope import frequencies_by_sample

# The factor of each family's logits. OPT's projection and the final norm of every family belong to
# the backbone. A test compares every family with its model's own logits.
LOGIT_SCALES: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(FAMILIES, lambda config: 1.0),
    "granite": lambda config: 1.0 / config.logits_scaling,
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
}

UNQUANTIZED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OutputHead:
    """Turns hidden states into logits. Under ZeRO-3 the parameters are partitioned, so gather them
    around `logits`.
    """

    # [V, D], shared with the embeddings if the model ties them; None for `identity_head`
    weight: nn.Parameter | None
    bias: nn.Parameter | None  # [V]
    scale: float
    soft_cap: float | None
    rows: int = field(default=0)  # V

    def __post_init__(self) -> None:
        if self.weight is not None:
            object.__setattr__(self, "rows", _full_shape(self.weight)[0])

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return self.rows if self.weight is None else _full_shape(self.weight)[1]

    def logits(self, hidden: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """Logits [n, size] of hidden states [n, D], in their dtype.

        size: compute only the first `size` ids; None is all V.
        """
        return self.scale_and_cap_(self.product(hidden, size))

    def product(
        self, hidden: torch.Tensor, size: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden Wᵀ + b for the first `size` ids: [n, size]. `out` receives it without gradient."""
        if self.weight is None:
            return hidden[:, :size].clone() if out is None else out.copy_(hidden[:, :size])
        weight, bias = self.weight[:size], None if self.bias is None else self.bias[:size]
        if out is None:
            return functional.linear(hidden, weight, bias)
        torch.mm(hidden, weight.T, out=out)
        return out if bias is None else out.add_(bias)

    def scale_and_cap_(self, product: torch.Tensor) -> torch.Tensor:
        """Turn a product into logits, in place: soft_cap · tanh(scale · product / soft_cap)."""
        if self.scale != 1.0:
            product = product.mul_(self.scale)
        if self.soft_cap is not None:
            product = product.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return product


@dataclass(frozen=True)
class HeadMixture:
    """Output heads of an ensemble over the same tokens (docs/method.md, eq. 22).

    The mixture is the sum of weight · softmax(logits / temperature). Its hidden states are those of
    all models, concatenated: [n, sum of widths].
    """

    heads: tuple[OutputHead, ...]
    weights: tuple[float, ...]  # their sum is 1

    def split_hidden(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The hidden states of each model: [n, width]."""
        return hidden.split([head.width for head in self.heads], dim=-1)


def hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    lengths: tuple[int, ...] | None = None,
    *,
    split: bool = True,
) -> torch.Tensor:
    """Last hidden states [B, T, D] after the final norm, without logits and without a cache.

    Row t predicts token t + 1. The backbone runs through its own forward, so that ZeRO-3's hooks
    fire. A sample's states do not depend on the length of its batch mates (see `models.rope`).

    Args:
        input_ids, attention_mask: [B, T], padded on the right.
        position_ids, lengths: [1, T] and the tokens of each sample of a packed row, for a model
            that `supports_packing`.
        split: False returns the model's own logits [B, T, V], for an `identity_head`.
    """
    packed: dict[str, Any] = {}
    if lengths is not None:
        packed = {"position_ids": position_ids, "samples": PackedSamples(lengths, input_ids.device)}
    module = model.base_model if split else model
    with frequencies_by_sample(model, attention_mask, lengths):
        output = module(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed
        )
    return output.last_hidden_state if split else output.logits


def supports_packing(model: Any) -> bool:
    """Whether `hidden_states` separates the samples of a packed row for this model."""
    return attn_implementation(model.config) == PER_SAMPLE


def has_known_head(model: Any) -> bool:
    """Whether `output_head` knows the model's family."""
    return model.config.model_type in LOGIT_SCALES


def identity_head(model: Any) -> OutputHead:
    """The head of an unknown family: the model's own logits serve as its hidden states."""
    rows = int(model.config.get_text_config(decoder=True).vocab_size)
    return OutputHead(None, None, 1.0, None, rows)


def output_head(model: Any) -> OutputHead:
    """The model's output head.

    Raises ModelError for an unknown family, and for a quantized head.
    """
    family = model.config.model_type
    linear = model.get_output_embeddings()
    quantized = is_quantized(model)
    unquantized = isinstance(linear, nn.Linear) and linear.weight.dtype in UNQUANTIZED_DTYPES
    if family in LOGIT_SCALES and quantized and not unquantized:
        raise ModelError(
            f"the output head of the quantized {family} model is quantized too, and logits need "
            "its plain weights: use a model with an unquantized head"
        )
    check_family(family)
    if not isinstance(linear, nn.Linear) or model.base_model is model:
        raise _unsupported_family(family)
    soft_cap = getattr(model.config, "final_logit_softcapping", None)
    weight = cast(nn.Parameter, linear.weight)
    return OutputHead(weight, linear.bias, float(LOGIT_SCALES[family](model.config)), soft_cap)


def check_family(family: str) -> None:
    """Raise ModelError for a family (`model_type` of a configuration) whose head is unknown."""
    if family not in LOGIT_SCALES:
        raise _unsupported_family(family)


def _full_shape(parameter: nn.Parameter) -> tuple[int, int]:
    """The shape of a matrix, also if ZeRO-3 partitions it."""
    rows, columns = full_shape(parameter)
    return int(rows), int(columns)


def _unsupported_family(family: str) -> ModelError:
    return ModelError(
        f"models of the family {family!r} are not supported: use one of "
        f"{', '.join(sorted(LOGIT_SCALES))}, set loss.fused=false, so that the model's own "
        "forward computes the logits of all positions at once, or add the family to models/heads.py"
    )
