"""Functions of both engines for a module's parameters and an optimizer's state.

They do not depend on how parameters are sharded: `gather` opens a block within which some
parameters are complete on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pocl_ds.compat.deepspeed_private import full_shape
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.runtime import distributed

Gather: TypeAlias = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[Any]]
ReadMaster: TypeAlias = Callable[[nn.Parameter], Tensor | None]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay on matrices, none on biases and norms."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (matrices if len(full_shape(parameter)) >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def frozen_names(module: nn.Module) -> set[str]:
    """All names of the parameters that are not trained. Checkpoints leave them out: they equal
    those in the model's folder.
    """
    return {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }


def load_trained_state(module: nn.Module, state: dict[str, Tensor], frozen: set[str]) -> None:
    """Load a state dict in which the frozen names may be missing.

    Raises ArtifactError for any other difference.
    """
    keys = module.load_state_dict(state, strict=False)
    mismatches = sorted({*keys.missing_keys} - frozen | {*keys.unexpected_keys})
    if mismatches:
        raise ArtifactError(
            f"the checkpoint and the student differ in {mismatches[0]}: remove the checkpoint, or "
            f"undo the change to the student"
        )


def reset_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Set an Adam's moments and step counts to zero, in place, so that shards and checkpoints keep
    their layout.
    """
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":
                state[key] = 0
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0


def copy_to_cpu(state: Any) -> Any:
    """A tree of dictionaries, lists and tuples with its tensors copied to CPU memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, copy_to_cpu(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(copy_to_cpu(value) for value in state)
    return state


def iterate_parameters(module: nn.Module, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """See `Engine.gathered_parameters`."""
    for name, parameter in module.named_parameters():
        with gather([parameter]):
            copy = parameter.detach().clone()
        yield name, copy


def full_state_dict(module: nn.Module, gather: Gather) -> dict[str, Tensor]:
    """See `Engine.gathered_state_dict`."""
    state: dict[str, Tensor] = {}
    is_writer = distributed.rank() == 0
    # One parameter at a time: at most one is held in full besides the shards.
    for name, parameter in module.named_parameters():
        with gather([parameter]):
            if is_writer:
                state[name] = parameter.detach().cpu().clone()
    return state | _persistent_buffers(module) if is_writer else state


def full_master_state_dict(
    module: nn.Module, gather: Gather, read_master: ReadMaster
) -> dict[str, Tensor]:
    """See `Engine.gathered_master_state_dict`. All ranks call `read_master` together.

    Raises RecipeError if it is None for a trained parameter of a lower precision.
    """
    state: dict[str, Tensor] = {}
    is_writer = distributed.rank() == 0
    for name, parameter in module.named_parameters():
        master = read_master(parameter)
        if master is None and parameter.requires_grad and parameter.dtype != torch.float32:
            raise RecipeError(
                f"export.dtype=float32, and the optimizer has no master weight of {name}: set "
                "student.ds_config to one of zero_stage 2 or 3, or export.dtype=auto"
            )
        with gather([parameter]) if master is None else contextlib.nullcontext():
            if is_writer:
                weight = parameter if master is None else master
                state[name] = weight.detach().float().cpu().clone()
    if is_writer:
        for name, buffer in _persistent_buffers(module).items():
            state[name] = buffer.float() if buffer.is_floating_point() else buffer
    return state


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that a state dict holds."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    persistent = set(module.state_dict()) - parameters
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in module.named_buffers()
        if name in persistent
    }


def keep_in_place(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """`gather` for parameters that are not sharded: does nothing."""
    return contextlib.nullcontext()
