"""What a model costs, from its configuration alone: parameters, arithmetic, and what its forward
keeps for backward.

Nothing is loaded. The model is built of fake tensors, which have shapes and no memory, and run
once: so activations follow from the family's own code, its dropout and its attention, and not from
a formula that knows one family.

Shapes: T tokens of a micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pocl_ds.config import LoraConfig
from pocl_ds.models.heads import check_family, output_head, hidden_states
from pocl_ds.models.load import empty_model
from pocl_ds.models.lora import adapter_parameters, is_linear, target_linear_modules
from pocl_ds.models.quiet import quiet


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one causal language model; parameters in numbers, not bytes."""

    family: str
    parameters: int  # tied ones once
    block_parameters: int  # of the largest block
    matrix_parameters: int  # that each token is multiplied with: all linear maps but the head
    head_parameters: int  # rows x width
    largest: int  # of a single parameter
    layers: int
    rows: int  # of the vocabulary
    width: int  # of the head's input
    attention_width: int  # heads x their width
    key_value_width: int  # the same of keys and values
    tied: bool
    adapters: int = 0  # parameters beside these, which alone are trained where there are any

    @property
    def trained(self) -> int:
        """Parameters that have gradients."""
        return self.adapters or self.parameters

    def forward_flops(self, lengths: Sequence[int], loss_tokens: int) -> float:
        """Multiplications and additions of one forward: attention causal over each sample, the head
        at loss positions only.
        """
        tokens = sum(lengths)
        attention = self.layers * sum(
            2.0 * length * (length + 1) * self.attention_width for length in lengths
        )
        return (
            2.0 * self.matrix_parameters * tokens
            + attention
            + 2.0 * self.head_parameters * loss_tokens
        )


def model_shape(config: Any, lora: LoraConfig | None = None) -> ModelShape:
    """Sizes of the model that a configuration describes, with adapters where `lora` says so. Raises
    ModelError for a family whose head is not known, RecipeError for adapters that it cannot have.
    """
    check_family(config.model_type)
    model = empty_model(config)
    head = output_head(model)
    blocks = _blocks(model)
    linears = [
        module
        for name, module in model.named_modules()
        if is_linear(module) and module.weight is not head.weight
    ]
    heads = config.num_attention_heads
    width_of_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        family=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        block_parameters=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        matrix_parameters=sum(module.weight.numel() for module in linears),
        head_parameters=head.rows * head.width,
        largest=max(p.numel() for p in model.parameters()),
        layers=len(blocks),
        rows=head.rows,
        width=head.width,
        attention_width=heads * width_of_head,
        key_value_width=(getattr(config, "num_key_value_heads", None) or heads) * width_of_head,
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
) -> int:
    """Bytes that the backbone's forward keeps for its backward over one micro-batch, its last
    hidden states included.

    lengths: tokens of each sample. With attention=per_sample they lie behind one another; else they
    are padded. lora: adapters that are trained alone.
    """
    from pocl_ds.models.attention import PER_SAMPLE
    from pocl_ds.models.load import set_dropout

    config = copy.deepcopy(
        config
    )  # dropout, and what transformers writes into it, are this model's alone
    if dropout is not None:
        set_dropout(config, dropout)
    kept: dict[int, tuple[int, Any]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype
        ).train()
        adapters = _imitated(model, lora) if lora else []
        for module in model.modules():
            if hasattr(
                module, "layerdrop"
            ):  # OPT looks at a random number there, which fake tensors do not have
                module.training = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        own = {
            tensor.untyped_storage()._cdata
            for tensor in (*model.parameters(), *model.buffers(), *adapters)
        }

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if attention == PER_SAMPLE:
                ids = torch.zeros(1, sum(lengths), dtype=torch.long)
                positions = torch.cat([torch.arange(length) for length in lengths])[None]
                states = hidden_states(model, ids, None, positions, tuple(lengths))
            else:
                ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
                states = hidden_states(model, ids, torch.ones_like(ids))
        return sum(size for size, _ in kept.values()) + states.untyped_storage().nbytes()


def _imitated(model: Any, lora: LoraConfig) -> list[nn.Parameter]:
    """Freeze a fake model and let its linear modules compute what adapters would add: peft moves
    its own, which fakes cannot.
    """
    model.requires_grad_(False)
    made: list[nn.Parameter] = []
    for module in target_linear_modules(model, lora.target_modules).values():
        inputs, outputs = (
            module.weight.shape if type(module).__name__ == "Conv1D" else module.weight.shape[::-1]
        )
        down, up = (
            nn.Parameter(module.weight.new_empty(shape))
            for shape in ((lora.r, inputs), (outputs, lora.r))
        )

        def add(
            module: nn.Module, given: Any, output: Tensor, down: Tensor = down, up: Tensor = up
        ) -> Tensor:
            read = functional.dropout(given[0], lora.dropout) if lora.dropout else given[0]
            return output + functional.linear(functional.linear(read, down), up) * (
                lora.alpha / lora.r
            )

        module.register_forward_hook(add)
        made += [down, up]
    return made


def _blocks(model: Any) -> list[nn.Module]:
    """The layers: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: len(list(modules))))


def parameter_bytes(numbers: float, dtype: str) -> float:
    """Bytes of so many numbers."""
    return numbers * (4 if dtype == "float32" else 2)


def max_gathered_parameters(shape: ModelShape) -> int:
    """Parameters whole on a rank while ZeRO-3 works: two blocks (one at work, one prefetched) and
    the embeddings or head.
    """
    return min(shape.parameters, 2 * shape.block_parameters + shape.largest)


def kv_cache_bytes(shape: ModelShape, tokens: int, dtype: str) -> float:
    """Keys and values of so many tokens, in generation."""
    return parameter_bytes(2.0 * shape.layers * shape.key_value_width * tokens, dtype)
