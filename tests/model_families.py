"""Tiny models of each family that `models.heads` knows, with random weights and no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pocl_ds.models.load  # noqa: F401  # registers the attention `per_sample`

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
    ("mixtral", {"num_local_experts": 4}),
    (
        "qwen2_moe",
        {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    ("qwen3_moe", {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "init_std": 0.3},
    ),
    (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.3},
    ),
]


def make_model(family: str, extra: dict[str, Any]) -> Any:
    common = {} if family == "gpt2" else BASE
    fields = {"vocab_size": 97, "initializer_range": 0.3, **common, **extra}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Zero biases and unit norms would hide a mistake.
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def in_float64(model: Any) -> Any:
    """The model in float64, up to norms that compute in float32."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the faster one has no float64
    return model.double()
