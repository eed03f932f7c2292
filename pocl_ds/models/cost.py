"""The cost of a model from its configuration alone: parameters, FLOPs, activation memory.

Nothing is loaded. Activations are measured by one run of a model of fake tensors, which have shapes
but no memory. So they follow from the family's own code, dropout and attention, not from a formula
that knows one family.

Shapes: T tokens of a micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pocl_ds.compat.torch_private import fake_tensors, storage_id
from pocl_ds.config import LoraConfig
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.dropout import set_dropout
from pocl_ds.models.heads import check_family, hidden_states, output_head
from pocl_ds.models.load import empty_model
from pocl_ds.models.lora import adapter_parameters, is_linear, target_linear_modules
from pocl_ds.models.mlp_tiles import tile_mlps
from pocl_ds.models.quiet import quiet


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one causal language model; parameters are counts, not bytes."""

    family: str
    parameters: int  # tied ones once
    block_parameters: int  # of the largest block
    matrix_parameters: int  # of all linear maps but the head, which multiply every token
    head_parameters: int  # rows x width
    largest_parameter: int  # elements of the largest parameter tensor
    layers: int
    rows: int  # of the vocabulary
    width: int  # of the head's input
    attention_width: int  # heads x width of a head
    key_value_width: int  # the same for keys and values
    tied: bool  # head and embeddings
    adapters: int = 0  # parameters of LoRA adapters; if not 0, only these are trained

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters with gradients."""
        return self.adapters or self.parameters

    def sample_flops(self, lengths: NDArray[Any], loss_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """FLOPs of one forward pass over each sample, [samples], with the head at loss positions
        only.

        lengths, loss_tokens: tokens of each sample, [samples]; attention is causal within a sample.
        """
        sizes = np.asarray(lengths, np.float64)
        attention = 2.0 * sizes * (sizes + 1) * self.attention_width
        return (
            2.0 * self.matrix_parameters * sizes
            + self.layers * attention
            + 2.0 * self.head_parameters * np.asarray(loss_tokens, np.float64)
        )

    def forward_flops(self, lengths: Sequence[int], loss_tokens: int) -> float:
        """FLOPs of one forward pass over samples of these lengths. loss_tokens: of all of them."""
        body = self.sample_flops(np.array(lengths), np.zeros(len(lengths)))
        return float(body.sum()) + 2.0 * self.head_parameters * loss_tokens


def model_shape(config: Any, lora: LoraConfig | None = None) -> ModelShape:
    """Sizes of the model of a configuration, with the adapters of `lora`.

    Raises ModelError for a family whose head is unknown, RecipeError for adapters that the model
    cannot have.
    """
    # Build the model without memory, and find its parts.
    check_family(config.model_type)
    model = empty_model(config)
    head = output_head(model)
    blocks = decoder_layers(model)
    linear_maps = [
        module
        for module in model.modules()
        if is_linear(module) and module.weight is not head.weight
    ]
    # Compute their sizes.
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        family=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        block_parameters=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        matrix_parameters=sum(module.weight.numel() for module in linear_maps),
        head_parameters=head.rows * head.width,
        largest_parameter=max(p.numel() for p in model.parameters()),
        layers=len(blocks),
        rows=head.rows,
        width=head.width,
        attention_width=heads * head_width,
        key_value_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        tied=head.weight is model.get_input_embeddings().weight,
        adapters=adapter_parameters(model, lora) if lora else 0,
    )


def activation_bytes(
    config: Any,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    attention: str,
    checkpointing: bool,
    dropout: float | None = None,
    lora: LoraConfig | None = None,
    mlp_tile_tokens: int | None = None,
) -> int:
    """Bytes that the backbone's forward keeps for its backward over one micro-batch, with its last
    hidden states.

    Args:
        lengths: tokens of each sample; packed with attention=per_sample, else padded.
        checkpointing: of activations.
        dropout: as `load_model` takes it.
        lora: adapters; only these are trained.
        mlp_tile_tokens: see `mlp_tiles`.
    """
    config = copy.deepcopy(config)  # it is changed below, and by transformers
    if dropout is not None:
        set_dropout(config, dropout)
    saved: dict[int, tuple[int, Any]] = {}  # storage -> bytes, and the storage to keep it alive
    with fake_tensors(), quiet():
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype
        ).train()
        adapters = _add_fake_adapters(model, lora) if lora else []
        for module in model.modules():
            if hasattr(module, "layerdrop"):  # OPT reads a random number, which fakes do not have
                module.training = False
        if mlp_tile_tokens:
            tile_mlps(decoder_layers(model), mlp_tile_tokens)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model_storages = {
            storage_id(tensor.untyped_storage())
            for tensor in (*model.parameters(), *model.buffers(), *adapters)
        }

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage_id(storage) not in model_storages:
                saved[storage_id(storage)] = (storage.nbytes(), storage)
            return tensor

        # Run the backbone, and record what autograd saves.
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            if attention == PER_SAMPLE:
                ids = torch.zeros(1, sum(lengths), dtype=torch.long)
                positions = torch.cat([torch.arange(length) for length in lengths])[None]
                states = hidden_states(model, ids, None, positions, tuple(lengths))
            else:
                ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
                states = hidden_states(model, ids, torch.ones_like(ids))
        return sum(size for size, _ in saved.values()) + states.untyped_storage().nbytes()


def _add_fake_adapters(model: Any, lora: LoraConfig) -> list[nn.Parameter]:
    """Freeze a model of fake tensors, and add to its linear modules what adapters compute.

    peft moves its adapters between devices, which fake tensors cannot do.
    """
    model.requires_grad_(False)
    adapters: list[nn.Parameter] = []
    for module in target_linear_modules(model, lora.target_modules).values():
        is_conv1d = type(module).__name__ == "Conv1D"
        inputs, outputs = module.weight.shape if is_conv1d else module.weight.shape[::-1]
        down = nn.Parameter(module.weight.new_empty((lora.r, inputs)))
        up = nn.Parameter(module.weight.new_empty((outputs, lora.r)))

        def add_adapter(
            module: nn.Module, inputs: Any, output: Tensor, down: Tensor = down, up: Tensor = up
        ) -> Tensor:
            hidden = functional.dropout(inputs[0], lora.dropout) if lora.dropout else inputs[0]
            update = functional.linear(functional.linear(hidden, down), up)
            return output + update * (lora.alpha / lora.r)

        module.register_forward_hook(add_adapter)
        adapters += [down, up]
    return adapters


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a model: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: len(list(modules))))


def parameter_bytes(count: float, dtype: str) -> float:
    """Bytes of `count` numbers of a dtype: 4 each in float32, else 2."""
    return count * (4 if dtype == "float32" else 2)


def max_gathered_parameters(shape: ModelShape) -> int:
    """Parameters that ZeRO-3 gathers on a rank: two blocks (one prefetched), and the embeddings or
    the head.
    """
    return min(shape.parameters, 2 * shape.block_parameters + shape.largest_parameter)


def kv_cache_bytes(shape: ModelShape, tokens: int, dtype: str) -> float:
    """Bytes of the key-value cache of `tokens` tokens."""
    return parameter_bytes(2.0 * shape.layers * shape.key_value_width * tokens, dtype)
