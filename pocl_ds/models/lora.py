"""Low-rank adapters added to frozen weights (LoRA, arXiv 2106.09685), with peft.

peft adds them to the model's own modules, so no other code needs to know of them. Only this
file imports peft.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pocl_ds.compat.deepspeed_private import full_shape
from pocl_ds.config import LoraConfig
from pocl_ds.config.registry import ALL_LINEAR
from pocl_ds.errors import ModelError, RecipeError, ResourceError

ADAPTER = "default"  # peft's name of the only adapter
# The weights of a layer with an adapter: its own, A and B.
ADAPTED_WEIGHTS = ("base_layer.weight", f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight")


def require_peft() -> None:
    """Raise ResourceError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ResourceError(
            "student.lora needs the package peft, which is not installed: pip install "
            "'pocl_ds[lora]'"
        )


def is_linear(module: Any) -> bool:
    """Whether a module is a linear map; those of GPT-2 are called Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def target_linear_modules(model: Any, targets: tuple[str, ...]) -> dict[str, Any]:
    """The linear modules that get an adapter, by their full names.

    targets: ends of names (`q_proj`, `self_attn.q_proj`), or `all-linear` for all but the head.
    Raises RecipeError for a target that names no linear module, the head or the embeddings.
    """
    # Find all linear modules but the head.
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head
    }
    if targets == (ALL_LINEAR,):
        return linear
    # Select the modules that the targets name.
    selected: dict[str, Any] = {}
    for target in targets:
        named = {
            name: module
            for name, module in model.named_modules()
            if f".{name}".endswith(f".{target}")
        }
        if any(module is head or isinstance(module, nn.Embedding) for module in named.values()):
            raise RecipeError(
                f"student.lora.target_modules names {target}: head and embeddings get no adapter, "
                "leave it out"
            )
        matches = {name: module for name, module in named.items() if name in linear}
        if not matches:
            raise RecipeError(
                f"student.lora.target_modules names {target}, which is not a linear module: use "
                f"some of {', '.join(_short_names(linear))}, or {ALL_LINEAR}"
            )
        selected |= matches
    return selected


def _short_names(names: Iterable[str]) -> list[str]:
    """The last parts of module names (`q_proj`), without duplicates."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def check_adapters(model: Any, config: LoraConfig) -> None:
    """Raise ResourceError if peft is missing, RecipeError if a model, which may be on the meta
    device, cannot have these adapters.
    """
    require_peft()
    target_linear_modules(model, config.target_modules)


def adapter_parameters(model: Any, config: LoraConfig) -> int:
    """Number of parameters of a model's adapters: r · (inputs + outputs) of each module.

    The model may be on the meta device.
    """
    modules = target_linear_modules(model, config.target_modules).values()
    return sum(config.r * sum(full_shape(module.weight)) for module in modules)


def add_adapters(model: Any, config: LoraConfig, seed: int) -> str:
    """Freeze the model and add adapters, in place. They change nothing at first: B is 0.

    Their weights depend only on the seed, so all ranks get the same ones. Returns a sentence for
    the log. Raises RecipeError (see `target_linear_modules`), ResourceError if peft is missing.
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
    trained, total = count_trainable_parameters(model)
    return (
        f"LoRA: {trained / 1e6:.1f} of {total / 1e6:.1f} million parameters are trained "
        f"(r {config.r}, alpha {config.alpha}, on {', '.join(_short_names(modules))})"
    )


def count_trainable_parameters(module: nn.Module) -> tuple[int, int]:
    """Number of parameters with gradients, and of all parameters; full sizes also under ZeRO-3."""
    sizes = [(full_shape(p).numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


@torch.no_grad()
def merge_adapters(
    model: Any, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Merge the adapters into the weights: W + alpha / r · B A, under the names without adapters.

    model: the model with adapters. weights: its full state as names and tensors, in the model's
    order; none on ranks that have none. The tensors are modified, and those of one layer at a time
    stay in memory.
    """
    layers = dict(_lora_layers(model))
    pending: dict[str, Tensor] = {}  # since the first weight of a layer that is not complete
    incomplete: set[str] = set()  # layers
    for name, tensor in weights:
        pending[name] = tensor
        layer_name = _adapted_layer(name)
        if layer_name in layers:
            names = [f"{layer_name}.{part}" for part in ADAPTED_WEIGHTS]
            if all(name in pending for name in names):
                base, down, up = pending[names[0]], pending.pop(names[1]), pending.pop(names[2])
                layer = layers[layer_name]
                update = up.float() @ down.float()
                update = (update.T if layer.fan_in_fan_out else update) * layer.scaling[ADAPTER]
                base.copy_(base.float() + update)  # rounded once, if weights are not float32
                incomplete.discard(layer_name)
            else:
                incomplete.add(layer_name)
        if not incomplete:
            for pending_name, pending_tensor in pending.items():
                yield _name_without_adapter(pending_name, layers), pending_tensor
            pending.clear()


def merge_adapter_folder(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder of peft merged. Raises ModelError for a kind of
    adapter that does not change weights, and for weights that are missing or fit nowhere; what peft
    raises for one of another model.
    """
    from peft import PeftModel

    wrapped: Any = PeftModel.from_pretrained(model, str(folder))
    if not hasattr(wrapped, "merge_and_unload"):
        kind = wrapped.peft_config[wrapped.active_adapter].peft_type.value
        raise ModelError(
            f"adapter {folder} is of the kind {kind}, which does not change weights and cannot be "
            "merged: give a LoRA adapter"
        )
    # Where names do not match, peft warns or says nothing, and merges a part of the adapter.
    mismatch = wrapped.load_adapter(str(folder), wrapped.active_adapter)
    for keys, fault, remedy in (
        (mismatch.missing_keys, "lacks weights", "get the complete adapter"),
        (
            mismatch.unexpected_keys,
            "has weights for which its base model has no place",
            "give the model that it was trained on as base_model_name_or_path",
        ),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(f"adapter {folder} {fault} ({keys[0]}{more}): {remedy}")
    return wrapped.merge_and_unload(safe_merge=True)


def save_adapter(
    model: Any, weights: Mapping[str, Tensor], folder: Path, *, base_model: str
) -> None:
    """Write the adapters alone, as the folder that peft loads.

    model: the model with adapters. weights: its full state. base_model: what they belong to, a
    folder or a name.
    """
    settings = model.peft_config[ADAPTER]
    settings = replace(settings, base_model_name_or_path=base_model, inference_mode=True)
    settings.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous().cpu()
        for name, tensor in weights.items()
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _lora_layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


def _adapted_layer(name: str) -> str:
    """The layer whose weight, A or B a parameter is; empty if it is none of them."""
    for part in ADAPTED_WEIGHTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}")
    return ""


def _name_without_adapter(name: str, layers: dict[str, Any]) -> str:
    module_name, _, parameter_name = name.rpartition(".base_layer.")
    return f"{module_name}.{parameter_name}" if module_name in layers else name
