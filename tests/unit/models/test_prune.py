"""Depth pruning removes the right layers, and the model still saves, loads and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.errors import ModelError
from pocl_ds.models.load import load_model
from pocl_ds.models.prune import parse_layers, prune_layers


def test_parse_layers() -> None:
    assert parse_layers("10-19") == list(range(10, 20))
    assert parse_layers(" 1, 3,5-7 ,3") == [1, 3, 5, 6, 7]


@given(st.sets(st.integers(0, 99), min_size=1))
def test_parse_layers_reads_any_list(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == sorted(layers)


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1,,2"])
def test_parse_layers_refuses(text: str) -> None:
    with pytest.raises(ModelError, match=r"write numbers and ranges"):
        parse_layers(text)


def test_parse_layers_suggests_the_reversed_range() -> None:
    with pytest.raises(ModelError, match=r"write 2-5"):
        parse_layers("5-2")


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_opt"])
def test_pruned_model_equals_one_that_skips_the_layer(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(name))
    ids = torch.arange(2, 12)[None]
    original: Any = load_model(folder)
    backbone = original.base_model.decoder if name == "tiny_opt" else original.base_model
    layers = backbone.h if name == "tiny_gpt2" else backbone.layers
    depth = len(layers)
    tuples = name != "tiny_llama"
    skipped_layer = layers[1]  # becomes an identity, as if it were pruned

    def skip(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if tuples and isinstance(output, tuple) else hidden

    skipped_layer.register_forward_hook(skip, with_kwargs=True)
    with torch.no_grad():
        expected = original(ids, use_cache=False).logits
    pruned = prune_layers(load_model(folder), [1])
    assert pruned.config.num_hidden_layers == depth - 1
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = load_model(str(tmp_path / "pruned"))
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, expected)
        torch.testing.assert_close(loaded(ids).logits, expected)


def test_layer_indices_are_renumbered(tiny_llama: Path) -> None:
    pruned = prune_layers(load_model(str(tiny_llama)), [0])
    assert [layer.self_attn.layer_idx for layer in pruned.base_model.layers] == [0, 1]
    ids = torch.arange(2, 8)[None]
    cached = pruned.generate(
        ids, max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=-1
    )
    plain = pruned.generate(
        ids, max_new_tokens=5, do_sample=False, use_cache=False, eos_token_id=-1
    )
    assert cached.tolist() == plain.tolist()


def test_config_lists_with_one_entry_per_layer_are_pruned() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    types = ["full_attention", "sliding_attention", "full_attention"]
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            layer_types=types,
            sliding_window=4,
            use_sliding_window=True,
        )
    )
    assert prune_layers(model, [0]).config.layer_types == types[1:]


def test_pruning_errors(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama))
    with pytest.raises(ModelError, match=r"names layer 3, the model has layers 0 to 2"):
        prune_layers(model, [1, 3])
    with pytest.raises(ModelError, match=r"all 3 layers"):
        prune_layers(model, [0, 1, 2])
    assert model.config.num_hidden_layers == 3
