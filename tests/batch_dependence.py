"""A model whose outputs depend on the other samples of the batch, as a broken one does."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaModel


def make_batch_dependent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last hidden states of LLaMA grow with the number of samples in the batch."""
    forward = LlamaModel.forward

    def scaled_forward(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        packed = kwargs.get("samples")
        samples = len(packed.lengths) if packed else len(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state * (1 + 0.1 * (samples - 1))
        return output

    monkeypatch.setattr(LlamaModel, "forward", scaled_forward)
