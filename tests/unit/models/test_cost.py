"""Sizes from a configuration against the model: its parameters, torch's FLOP counter, and what
autograd saves.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

from pocl_ds.bench.estimate import CPU_ATTENTION
from pocl_ds.config import LoraConfig
from pocl_ds.models.cost import activation_bytes, model_shape
from pocl_ds.models.dropout import set_dropout
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.lora import add_adapters, count_trainable_parameters

LENGTHS = (31, 17, 48)
SMALL = {"vocab_size": 300, "max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(
        **SMALL,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=300, n_positions=64, n_embd=128, n_layer=2, n_head=4),
    "opt": OPTConfig(
        **SMALL,
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        dropout=0.1,
    ),
    "qwen3": Qwen3Config(
        **SMALL,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        tie_word_embeddings=False,
    ),
}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, 300, (1, sum(LENGTHS))), torch.cat(
        [torch.arange(length) for length in LENGTHS]
    )[None]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_flops_and_parameters_equal_those_of_the_model(name: str) -> None:
    config = copy.deepcopy(CONFIGS[name])
    shape = model_shape(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="per_sample").eval()
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tied == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    ids, positions = inputs()
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, torch.no_grad():
        states = hidden_states(model, ids, None, positions, LENGTHS)
        output_head(model).product(states[0, :20])
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    # The counter counts the full square of attention, of which causal attention computes half.
    attention = sum(count for op, count in counts.items() if "attention" in str(op))
    assert attention > 0
    assert shape.forward_flops(LENGTHS, 20) == pytest.approx(
        sum(counts.values()) - attention / 2, rel=0.02
    )


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("attention", ["per_sample", "eager"])
def test_activation_bytes_equal_what_autograd_saves(name: str, attention: str) -> None:
    # A copy, since transformers writes the attention into the configuration.
    config, saved = copy.deepcopy(CONFIGS[name]), {}
    dropout = 0.0 if attention == "per_sample" else None
    before = config.to_dict()
    measured = activation_bytes(
        config,
        LENGTHS,
        dtype=torch.float32,
        attention=attention,
        checkpointing=False,
        dropout=dropout,
    )
    assert config.to_dict() == before
    if dropout is not None:
        set_dropout(config, dropout)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    own_storages = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own_storages:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        if attention == "per_sample":
            ids, positions = inputs()
            states = hidden_states(model, ids, None, positions, LENGTHS)
        else:
            ids = torch.randint(3, 300, (3, max(LENGTHS)))
            states = hidden_states(model, ids, torch.ones_like(ids))
    expected = sum(storage.nbytes() for storage in saved.values())
    assert measured == pytest.approx(expected, rel=0.03, abs=states.numel() * 4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_activation_bytes_with_adapters(name: str) -> None:
    """What autograd saves depends on what is frozen; adapters are counted separately."""
    pytest.importorskip("peft")
    config, lora = copy.deepcopy(CONFIGS[name]), LoraConfig(r=4)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="per_sample").train()
    assert (
        model_shape(config).adapters == 0
        and model_shape(config).trainable_parameters == model_shape(config).parameters
    )
    add_adapters(model, lora, 0)
    shape = model_shape(config, lora)
    assert (
        shape.trainable_parameters,
        shape.parameters + shape.adapters,
    ) == count_trainable_parameters(model)
    assert shape.parameters == model_shape(config).parameters
    measured = activation_bytes(
        config, LENGTHS, dtype=torch.float32, attention="per_sample", checkpointing=False, lora=lora
    )
    own_storages, saved = (
        {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())},
        {},
    )

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own_storages:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids, positions = inputs()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        states = hidden_states(model, ids, None, positions, LENGTHS)
    assert measured == pytest.approx(
        sum(storage.nbytes() for storage in saved.values()), rel=0.03, abs=states.numel() * 4
    )


def test_activation_bytes_with_checkpointing_and_more_tokens() -> None:
    def saved(lengths: tuple[int, ...], checkpointing: bool) -> int:
        return activation_bytes(
            CONFIGS["llama"],
            lengths,
            dtype=torch.bfloat16,
            attention="per_sample",
            checkpointing=checkpointing,
        )

    assert saved((64,), True) < 0.4 * saved((64,), False)
    assert saved((64, 64), False) == pytest.approx(2 * saved((64,), False), rel=0.05)
