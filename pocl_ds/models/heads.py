"""A causal language model in two parts: the backbone up to its last hidden state, and the head that
makes logits.

Distillation needs logits at loss positions only, and in chunks; so the head is applied apart from
the model's own forward. What a family does after the head's matrix (a scale, a soft cap) is written
down here, family by family.

Shapes: B sequences, T positions, D width of the head's input, V vocabulary rows, n positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from pocl_ds.errors import ModelError
from pocl_ds.models.attention import FAMILIES, PER_SAMPLE, PackedSamples

# Families whose logits are a plain linear map of the last hidden state (OPT's projection and every
# family's final norm belong to the backbone), and those that scale them. Each is held to its
# model's own logits by a test.
SCALES: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(FAMILIES, lambda config: 1.0),
    "granite": lambda config: 1.0 / config.logits_scaling,
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
}

PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OutputHead:
    """From hidden states to logits. Under ZeRO-3 the parameters are partitioned: gather them around
    `logits`.
    """

    weight: (
        nn.Parameter | None
    )  # [V, D], shared with the embeddings where the model ties them; None: see `identity_head`
    bias: nn.Parameter | None  # [V]
    scale: float
    soft_cap: float | None
    rows: int = field(default=0)  # V

    def __post_init__(self) -> None:
        if self.weight is not None:  # a partitioned parameter has no shape
            object.__setattr__(
                self, "rows", int(getattr(self.weight, "ds_shape", self.weight.shape)[0])
            )

    @property
    def width(self) -> int:
        """D."""
        return (
            self.rows
            if self.weight is None
            else int(getattr(self.weight, "ds_shape", self.weight.shape)[1])
        )

    def logits(self, hidden: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """Logits [n, size] of hidden states [n, D], in their dtype, for the first `size` ids (None:
        all V).
        """
        return self.scale_and_cap_(self.product(hidden, size))

    def product(
        self, hidden: torch.Tensor, size: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden Wᵀ + b for the first `size` ids; written to `out` where it is given, without a
        gradient.
        """
        if self.weight is None:
            return hidden[:, :size].clone() if out is None else out.copy_(hidden[:, :size])
        weight, bias = self.weight[:size], None if self.bias is None else self.bias[:size]
        if out is None:
            return functional.linear(hidden, weight, bias)
        torch.mm(hidden, weight.T, out=out)
        return out if bias is None else out.add_(bias)

    def scale_and_cap_(self, product: torch.Tensor) -> torch.Tensor:
        """From the product to the logits, in place: soft_cap · tanh(scale · product / soft_cap)."""
        if self.scale != 1.0:
            product = product.mul_(self.scale)
        if self.soft_cap is not None:
            product = product.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return product


@dataclass(frozen=True)
class HeadMixture:
    """Heads of several models over the same tokens, whose distributions are mixed: sum of weight x
    softmax(logits / temperature).

    Their hidden states lie side by side: [n, sum of widths].
    """

    heads: tuple[OutputHead, ...]
    weights: tuple[float, ...]  # that sum to 1

    def split_hidden(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The hidden states of each: [n, width]."""
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
    """Last hidden states [B, T, D] after the final norm, without logits and without a cache; or
    unsplit the logits [B, T, V].

    input_ids, attention_mask: [B, T], padding on the right. lengths and position_ids [1, T]: of the
    samples packed behind one another in a single row, for a model that `supports_packing`. The backbone runs
    through its own forward, so that ZeRO-3's hooks fire. Row t predicts token t + 1.
    """
    packed: dict[str, Any] = {}
    if lengths is not None:
        packed = {"position_ids": position_ids, "samples": PackedSamples(lengths, input_ids.device)}
    part = model.base_model if split else model
    output = part(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed)
    return output.last_hidden_state if split else output.logits


def supports_packing(model: Any) -> bool:
    """Whether `hidden_states` keeps the samples of a packed row apart for this model."""
    return model.config._attn_implementation == PER_SAMPLE


def has_known_head(model: Any) -> bool:
    """Whether `output_head` knows the model's family."""
    return model.config.model_type in SCALES


def identity_head(model: Any) -> OutputHead:
    """In place of a head that is not known: the model's own logits count as its hidden states, and
    are left as they are.
    """
    return OutputHead(None, None, 1.0, None, int(model.config.get_text_config(decoder=True).vocab_size))


def output_head(model: Any) -> OutputHead:
    """The model's head. Raises ModelError for a family whose way from hidden state to logits is not
    known here, and for a head whose weights are quantised.
    """
    family = model.config.model_type
    linear = model.get_output_embeddings()
    quantised = getattr(model, "hf_quantizer", None) is not None
    if (
        family in SCALES
        and quantised
        and not (isinstance(linear, nn.Linear) and linear.weight.dtype in PLAIN)
    ):
        raise ModelError(
            f"the output head of the quantised {family} model is quantised too, and logits are "
            f"made from its plain weights: take "
            "a model whose head is not"
        )
    check_family(family)
    if not isinstance(linear, nn.Linear) or model.base_model is model:
        raise _not_supported(family)
    soft_cap = getattr(model.config, "final_logit_softcapping", None)
    weight = cast(nn.Parameter, linear.weight)
    return OutputHead(weight, linear.bias, float(SCALES[family](model.config)), soft_cap)


def check_family(family: str) -> None:
    """Raise ModelError for a family (`model_type` of a configuration) whose head is not known here."""
    if family not in SCALES:
        raise _not_supported(family)


def _not_supported(family: str) -> ModelError:
    return ModelError(
        f"models of the family {family!r} are not supported: use one of "
        f"{', '.join(sorted(SCALES))}, "
        "set loss.fused=false, with which the model's own forward makes logits of all positions "
        "at once, or add the family "
        "to models/heads.py"
    )
