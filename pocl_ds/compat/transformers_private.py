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
