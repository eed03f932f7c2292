"""`train.compile: layers`: equal losses and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_families import make_model
from torch import Tensor

from pocl_ds.compat.torch_private import set_compile_disabled
from pocl_ds.config import TrainConfig
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.cost import decoder_layers
from pocl_ds.models.heads import hidden_states
from pocl_ds.training import compilation
from pocl_ds.training.compilation import compile_layers

COMPILED = TrainConfig(engine="torch", compile="layers")


def states_and_gradients(model: Any, lengths: tuple[int, ...]) -> list[Tensor]:
    """The last hidden states of a packed row, and the gradients of the sum of their squares."""
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    model.zero_grad()
    states = hidden_states(model, ids, None, places, lengths)
    states.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [states.detach(), *gradients]


def count_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_compiled_layers_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """For other lengths nothing is compiled again. `aot_eager` runs the same graphs without
    generating code for them, which takes minutes.
    """
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    model = make_model("llama", {"num_hidden_layers": 2})
    model.set_attn_implementation(PER_SAMPLE)
    compiled = copy.deepcopy(model)
    compiled.gradient_checkpointing_enable({"use_reentrant": False})
    compile_layers(compiled, COMPILED)
    graphs, before = [], count_graphs()
    was_disabled = set_compile_disabled(False)  # an engine of vLLM in this process disables it
    try:
        for lengths in ((5, 6, 7), (9, 1), (2, 3, 4, 8)):
            expected = states_and_gradients(model.train(), lengths)
            results = states_and_gradients(compiled.train(), lengths)
            graphs.append(count_graphs())
            largest = max(float(tensor.abs().max()) for tensor in expected)
            for value, reference in zip(results, expected, strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5 * largest)
    finally:
        set_compile_disabled(was_disabled)
    assert graphs[0] > before and graphs == graphs[:1] * 3


def test_layers_are_compiled_only_if_the_recipe_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: calls.append(function) or function)
    model = make_model("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64})
    compile_layers(model, TrainConfig(engine="torch"))
    assert calls == []
    compile_layers(model, COMPILED)
    assert [call.__self__ for call in calls] == decoder_layers(model) == list(model.transformer.h)
