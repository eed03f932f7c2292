"""Models that only run forward: the teacher."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl_ds.data.batches import Batch
from pocl_ds.engines.deepspeed_engine import (
    gather_parameters,
    release_frozen_module,
    shard_frozen_module,
)
from pocl_ds.models.heads import hidden_states
from pocl_ds.runtime import distributed


class TeacherBackbone(nn.Module):
    """The teacher up to its final norm, at loss positions only.

    split: apply the head separately from the model; otherwise the model returns logits.
    """

    def __init__(self, model: PreTrainedModel, *, split: bool = True) -> None:
        super().__init__()
        self.model, self.split = model, split

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [loss tokens, width] of a batch in the teacher's ids."""
        return batch.at_loss_positions(hidden_states(self.model, *batch.inputs, split=self.split))


class FrozenModel:
    """A module without gradients, sharded by ZeRO-3 if there is a DeepSpeed configuration."""

    def __init__(self, module: nn.Module, ds_config: dict[str, Any] | None) -> None:
        module.eval().requires_grad_(False)
        self.is_sharded = ds_config is not None
        self.module: Any
        if ds_config is not None:
            self.module = shard_frozen_module(module, ds_config)
            return
        device = distributed.device()
        # A quantized model is on its device already and must not be moved.
        in_place = all(parameter.device == device for parameter in module.parameters())
        self.module = module if in_place else module.to(device)

    @torch.no_grad()
    def forward(self, *arguments: Any) -> Any:
        """The module's forward, without a gradient."""
        return self.module(*arguments)

    def close(self) -> None:
        """Release what DeepSpeed holds of the module, so that it is freed with its last owner."""
        if self.is_sharded:
            release_frozen_module(self.module)

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Within the block these parameters are complete on every rank."""
        return gather_parameters(parameters) if self.is_sharded else contextlib.nullcontext()
