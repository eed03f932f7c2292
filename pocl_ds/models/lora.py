"""Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685), by peft: where they go, how
many they are, their merge.

peft puts them into the model's own modules, so the model stays what it was to everyone else. This
is the only file that imports peft.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pocl_ds.config import LoraConfig
from pocl_ds.config.registry import ALL_LINEAR
from pocl_ds.errors import RecipeError, ResourceError
from pocl_ds.models.load import empty_model

ADAPTER = "default"  # peft's name for the only one


def require_peft() -> None:
    """Raise ResourceError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ResourceError(
            "student.lora needs the package peft, which is not installed: pip install "
            "'pocl_ds[lora]'"
        )


def is_linear(module: Any) -> bool:
    """Linear maps; GPT-2's are called Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def target_linear_modules(model: Any, targets: tuple[str, ...]) -> dict[str, Any]:
    """The linear modules that get an adapter, by their full names.

    targets: last parts of names (`q_proj`, `self_attn.q_proj`), or all but the head. Raises
    RecipeError for one that names no linear module, and for the head and the embeddings, which stay
    as they are.
    """
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head
    }
    if targets == (ALL_LINEAR,):
        return linear
    found: dict[str, Any] = {}
    for target in targets:
        named = {
            name: module
            for name, module in model.named_modules()
            if f".{name}".endswith(f".{target}")
        }
        if any(module is head or isinstance(module, nn.Embedding) for module in named.values()):
            raise RecipeError(
                f"student.lora.target_modules names {target}: head and embeddings get no adapter, leave "
                f"it out"
            )
        matching = {name: module for name, module in named.items() if name in linear}
        if not matching:
            there = ", ".join(_last_parts(linear))
            raise RecipeError(
                f"student.lora.target_modules names {target}, and no linear module is called so: take "
                f"some of "
                f"{there}, or {ALL_LINEAR}"
            )
        found |= matching
    return found


def _last_parts(names: Iterable[str]) -> list[str]:
    """q_proj for every ...q_proj, in order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def check_adapters(config: Any, lora: LoraConfig, *, trust_remote_code: bool = False) -> None:
    """Raise ResourceError where peft is missing, RecipeError where the model of this configuration
    cannot have such adapters.
    """
    require_peft()
    target_linear_modules(empty_model(config, trust_remote_code=trust_remote_code), lora.target_modules)


def adapter_parameters(model: Any, config: LoraConfig) -> int:
    """How many parameters the adapters of a model have: rank x (inputs + outputs) of each. The
    model may be on `meta`.
    """
    weights = [module.weight for module in target_linear_modules(model, config.target_modules).values()]
    return sum(config.r * sum(getattr(weight, "ds_shape", weight.shape)) for weight in weights)


def add_adapters(model: Any, config: LoraConfig, seed: int) -> str:
    """Freeze the model and put adapters into it, in place. They start as nothing: their second
    matrix is 0.

    All ranks get the same ones, whatever each holds of the model's weights. Returns a sentence for
    the log. Raises RecipeError (see `target_linear_modules`) and ResourceError where peft is missing.
    """
    require_peft()
    import peft

    modules = target_linear_modules(model, config.target_modules)
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(modules),
        bias="none",
        fan_in_fan_out=any(not isinstance(module, nn.Linear) for module in modules.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    trained, whole = trained_parameters(model)
    return (
        f"LoRA: {trained / 1e6:.1f} of {whole / 1e6:.1f} million parameters are trained (rank "
        f"{config.r}, alpha "
        f"{config.alpha}, on {', '.join(_last_parts(modules))})"
    )


def trained_parameters(module: nn.Module) -> tuple[int, int]:
    """How many parameters have gradients, and how many there are; whole ones, where ZeRO-3 sharded
    them.
    """
    sizes = [
        (math.prod(getattr(p, "ds_shape", p.shape)), p.requires_grad) for p in module.parameters()
    ]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


@torch.no_grad()
def merge_adapters(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters: W + alpha / rank * B A for each, under its name
    without them.

    model: with adapters. weights: all of it by name, whole and the caller's own, since they are
    written to; or none, on ranks that hold none.
    """
    if not weights:
        return weights
    layers = dict(_layers(model))
    for name, layer in layers.items():
        down, up = (weights.pop(f"{name}.lora_{side}.{ADAPTER}.weight") for side in "AB")
        change = up.float() @ down.float()
        change = (change.T if layer.fan_in_fan_out else change) * layer.scaling[ADAPTER]
        base = weights[f"{name}.base_layer.weight"]
        base.copy_(base.float() + change)  # rounded once, where weights are not float32
    return {_plain(name, layers): tensor for name, tensor in weights.items()}


def _layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


def _plain(name: str, layers: dict[str, Any]) -> str:
    owner, _, part = name.rpartition(".base_layer.")
    return f"{owner}.{part}" if owner in layers else name
