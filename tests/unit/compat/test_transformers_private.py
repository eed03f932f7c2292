"""What `compat/transformers_private.py` assumes of transformers. A failure here means that upstream
has changed: adapt that file.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pocl_ds.compat import transformers_private
from pocl_ds.models.load import load_model, load_model_config


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attn_implementation(name: str, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=name)
    assert transformers_private.attn_implementation(model.config) == name
    model.set_attn_implementation("eager")
    assert transformers_private.attn_implementation(model.config) == "eager"


@pytest.mark.parametrize("name", list(tiny_models.FAMILIES))
def test_tied_parameters_are_those_that_share_storage(name: str, tmp_path: Path) -> None:
    folder = tiny_models.family(tmp_path / name, name, layers=1)
    model = load_model(str(folder))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = transformers_private.tied_parameters(load_model_config(str(folder)))
    for omitted, stored in tied.items():
        assert parameters[omitted] is parameters[stored]
    shared = len(parameters) - len(dict(model.named_parameters()))
    assert len(tied) == shared and dict(model.all_tied_weights_keys) == dict(tied)


def test_a_plain_model_is_not_quantized(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama))
    assert not transformers_private.is_quantized(model)
    model.hf_quantizer = object()
    assert transformers_private.is_quantized(model)


def test_the_code_of_a_custom_model_is_copied(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modeling_custom.py").write_text(
        "from transformers import LlamaForCausalLM\n\nclass Custom(LlamaForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("modeling_custom").Custom.from_pretrained(tiny_llama)
    folder = tmp_path / "saved"
    folder.mkdir()
    transformers_private.save_custom_code(model, folder)
    assert list(folder.iterdir()) == []

    type(model).register_for_auto_class("AutoModelForCausalLM")
    transformers_private.save_custom_code(model, folder)
    assert [path.name for path in folder.iterdir()] == ["modeling_custom.py"]
    assert model.config.auto_map == {"AutoModelForCausalLM": "modeling_custom.Custom"}


def test_layers_index_the_cache_by_their_position(tiny_llama: Path) -> None:
    """A model whose first layer was removed generates only with renumbered layers."""
    model = load_model(str(tiny_llama))
    layers = model.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(len(layers)))
    model.model.layers = nn.ModuleList([layers[1]])
    model.config.num_hidden_layers = 1
    transformers_private.renumber_layers(model.model.layers)
    assert model.model.layers[0].self_attn.layer_idx == 0
    ids = torch.tensor([[5, 6, 7]])
    output = model.generate(ids, max_new_tokens=3, do_sample=False)
    cached = model(output[:, :-1], use_cache=True)
    assert len(cached.past_key_values) == 1


@pytest.mark.parametrize("name", ["tiny_longrope", "tiny_dynamic_ntk"])
def test_rotary_modules_with_frequencies_by_length(
    name: str, tiny_llama: Path, request: pytest.FixtureRequest
) -> None:
    """The module forgets a long sequence: its frequencies are again those of short ones."""
    model: Any = load_model(str(request.getfixturevalue(name)))
    module = model.model.rotary_emb
    assert transformers_private.rotary_modules(model) == [module]
    assert transformers_private.rotary_modules(load_model(str(tiny_llama))) == []
    original = module.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(2, 102)[None])
    assert not torch.equal(module.inv_freq, original)
    transformers_private.reset_rotary_module(module)
    assert torch.equal(module.inv_freq, original)
    assert module.max_seq_len_cached == model.config.max_position_embeddings
