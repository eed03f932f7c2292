"""Backbone and head apart give the model's own logits, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_ds.errors import ModelError
from pocl_ds.models.heads import head_of, hidden_states

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {}),
    ("gemma", {}),
    ("gemma2", {"final_logit_softcapping": 3.0}),
    ("phi", {}),
    ("phi3", {}),
    ("gpt_neox", {}),
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.0625}),
    ("cohere2", {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "init_std": 0.3}),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.3}),
]


def tiny(family: str, extra: dict[str, Any]) -> Any:
    common = {} if family == "gpt2" else BASE
    fields = {"vocab_size": 97, "initializer_range": 0.3, **common, **extra}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zero biases and unit norms would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize(("family", "extra"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_head_gives_the_models_own_logits(family: str, extra: dict[str, Any]) -> None:
    model = tiny(family, extra)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        hidden = hidden_states(model, ids, mask)
        found = head_of(model).logits(hidden[mask.bool()])
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "extra"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_samples_in_a_packed_row_do_not_see_each_other(family: str, extra: dict[str, Any], attention: str) -> None:
    """Packed against padded, also where positions are learned and where attention looks through a window."""
    model = tiny(family, {"sliding_window": 4, **extra} if family in ("mistral", "phi3", "gemma2", "cohere2") else extra)
    model.set_attn_implementation(attention)
    lengths = [9, 1, 6, 7]
    ids = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    row, places = ids[mask.bool()][None], torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        padded = hidden_states(model, ids, mask)[mask.bool()]
        packed = hidden_states(model, row, None, places)[0]
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "scale", "soft_cap"),
    [("granite", 1 / 8, None), ("cohere", 1 / 16, None), ("gemma2", 1.0, 3.0), ("phi", 1.0, None)],
)
def test_what_a_family_does_after_the_matrix_is_read(family: str, scale: float, soft_cap: float | None) -> None:
    head = head_of(tiny(family, dict(FAMILIES)[family]))
    assert (head.scale, head.soft_cap) == (scale, soft_cap)
    assert (head.bias is not None) == (family == "phi")


def test_tied_head_is_the_embedding_itself() -> None:
    model = tiny("llama", {"tie_word_embeddings": True})
    assert head_of(model).weight is model.get_input_embeddings().weight


def test_hidden_states_go_through_the_backbones_forward_without_a_cache() -> None:
    model = tiny("llama", {})
    seen = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["use_cache"], out)), with_kwargs=True
    )
    ids = torch.ones(1, 4, dtype=torch.long)
    hidden_states(model, ids, torch.ones_like(ids))
    assert len(seen) == 1
    assert seen[0][0] is False
    assert seen[0][1].past_key_values is None


def test_position_ids_reach_the_model() -> None:
    model = tiny("gpt2", dict(FAMILIES)["gpt2"])
    ids = torch.full((1, 4), 5)
    mask = torch.ones_like(ids)
    plain = hidden_states(model, ids, mask)
    again = hidden_states(model, ids, mask, torch.arange(4)[None])
    other = hidden_states(model, ids, mask, torch.arange(4)[None] + 7)
    torch.testing.assert_close(plain, again)
    assert not torch.allclose(plain, other)


def test_unknown_family_is_named() -> None:
    model = tiny("llama", {})
    model.config.model_type = "mystery"
    with pytest.raises(ModelError, match=r"'mystery' are not supported: use one of .*llama"):
        head_of(model)
