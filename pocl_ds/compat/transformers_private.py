"""Private names of transformers that this package uses, seen in transformers 5.19.

tests/unit/compat/test_transformers_private.py fails when one of them changes. transformers is
imported inside the functions, because plain tensor code imports this file and need not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn


def attn_implementation(config: Any) -> str:
    """The attention that a loaded model uses: "eager", "sdpa" or a registered name.

    `from_pretrained(attn_implementation=...)` is public, and so is `set_attn_implementation`, but
    the value can only be read back from `config._attn_implementation`.
    """
    return str(config._attn_implementation)


def tied_parameters(config: Any) -> Mapping[str, str]:
    """Tied parameters of the causal language model of a configuration: each name that a checkpoint
    leaves out, mapped to the name under which it stores the weights. Empty if nothing is tied.

    A model has this as `all_tied_weights_keys`, but here only the configuration is loaded: the
    class attribute `_tied_weights_keys` is its source.
    """
    if not config.tie_word_embeddings:
        return {}
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names: Mapping[str, str] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._tied_weights_keys
    return names


def is_quantized(model: Any) -> bool:
    """Whether transformers loaded the model through a quantizer (bitsandbytes, GPTQ and others).

    A model has no public flag for this; `from_pretrained` sets `hf_quantizer`.
    """
    return getattr(model, "hf_quantizer", None) is not None


def save_custom_code(model: Any, folder: Path) -> None:
    """Copy the Python files of a model that came with its own code (trust_remote_code) to `folder`,
    and name them in the model's configuration. Does nothing for the classes of transformers.

    `save_pretrained` does the same, but only together with the weights, which are written from
    gathered shards here.
    """
    if getattr(model, "_auto_class", None):
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=model.config)


def renumber_layers(layers: Sequence[nn.Module]) -> None:
    """Give each layer's modules its position as their `layer_idx`, in place.

    Modules index the key-value cache by `layer_idx`, which their constructor sets; transformers has
    no function that removes layers from a model.
    """
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def render_with_generation_blocks(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the start and end of each `{% generation %}` block in it, in
    characters.

    `apply_chat_template(return_assistant_tokens_mask=True)` is public, but gives only the mask of
    the tokens, from which neighbouring turns cannot be told apart.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, blocks = render_jinja_template(
        conversations=[list(messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(None, tools),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    return str(texts[0]), [(int(start), int(end)) for start, end in blocks[0]]


def rotary_modules(model: Any) -> list[nn.Module]:
    """The modules of a model that compute rotary embeddings with frequencies that depend on the
    positions of the batch: those whose forward transformers wraps in `dynamic_rope_update`.

    They share no class; what they share is `rope_type`, a name or a name for each type of layer.
    """
    modules = []
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        names = list(rope_type.values()) if isinstance(rope_type, dict) else [rope_type]
        if any(name == "longrope" or "dynamic" in str(name) for name in names):
            modules.append(module)
    return modules


def reset_rotary_module(module: Any) -> None:
    """Let a rotary module forget the longest sequence it has seen (`max_seq_len_cached`, also by
    type of layer), so that dynamic NTK scaling starts from its own frequencies.

    A forward pass over a short sequence resets it too, but not one of exactly the module's limit.
    """
    names = list(module.rope_type) if isinstance(module.rope_type, dict) else [None]
    for name in names:
        prefix = f"{name}_" if name else ""
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        original = getattr(module, f"{prefix}original_inv_freq")
        inv_freq = getattr(module, f"{prefix}inv_freq")
        module.register_buffer(f"{prefix}inv_freq", original.to(inv_freq.device), persistent=False)
