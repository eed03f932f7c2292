"""Rotary embeddings whose frequencies depend on the length of the sequence (LongRoPE of Phi-3,
`dynamic` NTK scaling): every sample gets the frequencies of its own length.

transformers chooses them once per forward pass, by the largest position in the batch, so a short
sample would change with the samples that share its batch. Here the rotary module is asked once for
each group of samples that have the same frequencies, with the positions of these samples alone.

Shapes: B rows, T positions, d width of a head's rotated part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocl_ds.compat.transformers_private import reset_rotary_module, rotary_modules
from pocl_ds.runtime import sequence_parallel

LONGROPE, DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True)
class LengthDependence:
    """How a model's rotary frequencies depend on the length of a sequence."""

    rope_type: str  # LONGROPE: one set up to `boundary`, one above it. DYNAMIC: one per length
    boundary: int  # the longest sequence in tokens that has the frequencies of short ones

    def group(self, length: int) -> int:
        """Sequences of the same group have the same frequencies. Group 0 is that of short ones."""
        if length <= self.boundary:
            return 0
        return length if self.rope_type == DYNAMIC else 1


def length_dependence(config: Any) -> LengthDependence | None:
    """How the frequencies of a model's configuration depend on length; None if they do not."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    dependences = []
    for entry in (parameters, *nested):
        rope_type = str(entry.get("rope_type", ""))
        if rope_type == LONGROPE:
            dependences.append(
                LengthDependence(LONGROPE, int(entry["original_max_position_embeddings"]))
            )
        elif DYNAMIC in rope_type:
            dependences.append(LengthDependence(DYNAMIC, int(text.max_position_embeddings)))
    if len(set(dependences)) < 2:
        return dependences[0] if dependences else None
    # Layers that differ: a group per length is right for each of them.
    return LengthDependence(DYNAMIC, min(dependence.boundary for dependence in dependences))


@contextlib.contextmanager
def frequencies_by_sample(
    model: Any, attention_mask: Tensor | None, lengths: Sequence[int] | None
) -> Iterator[None]:
    """Within the block a forward pass of the model gives each sample the rotary frequencies of its
    own length. Does nothing for a model whose frequencies do not depend on length.

    attention_mask: [B, T] of rows that are padded on the right. lengths: tokens of each sample of a
    packed row, in place of the mask; the model may run on a part of that row (sequence
    parallelism). With neither every row is one sample without padding.
    """
    dependence = length_dependence(model.config)
    if dependence is None:
        yield
        return
    packed = lengths is not None
    if lengths is None and attention_mask is not None:
        lengths = attention_mask.sum(1).tolist()
    hook = partial(_choose_frequencies, dependence, lengths, packed)
    with contextlib.ExitStack() as stack:
        for module in rotary_modules(model):
            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def reset_frequencies(model: Any) -> None:
    """Let a model of dynamic NTK scaling forget the longest sequence that it has seen."""
    for module in rotary_modules(model):
        reset_rotary_module(module)


def _choose_frequencies(
    dependence: LengthDependence,
    lengths: Sequence[int] | None,
    packed: bool,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The forward hook of a rotary module: cosines and sines [B, T, d] by sample."""
    arguments = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    positions = arguments.pop("position_ids")
    if lengths is None:
        lengths = [positions.shape[1]] * positions.shape[0]
    groups = [dependence.group(length) for length in lengths]

    # Give each token the group of its sample. Padding gets the last position of its row.
    if packed:
        sizes = torch.tensor(lengths, device=positions.device)
        token_groups = torch.tensor(groups, device=positions.device).repeat_interleave(sizes)[None]
        if token_groups.shape != positions.shape:
            token_groups = token_groups.chunk(sequence_parallel.size(), 1)[sequence_parallel.part()]
    else:
        last = torch.tensor(lengths, device=positions.device)[:, None] - 1
        positions = positions.expand(len(lengths), -1).minimum(last)
        token_groups = torch.tensor(groups, device=positions.device)[:, None].expand_as(positions)

    # Ask the module once per group. It chooses by the largest position, so the last position of a
    # sample of the group comes along: a part of a row may not have it.
    shape = (*positions.shape, output[0].shape[-1])
    cos, sin = output[0].new_empty(shape), output[1].new_empty(shape)
    for group in sorted(set(groups)):
        chosen = token_groups == group
        reset_rotary_module(module)
        last_position = max(n for n in lengths if dependence.group(n) == group) - 1
        chosen_positions = functional.pad(positions[chosen], (0, 1), value=last_position)
        group_cos, group_sin = module.forward(position_ids=chosen_positions[None], **arguments)
        cos[chosen], sin[chosen] = group_cos[0, :-1], group_sin[0, :-1]
    return cos, sin
