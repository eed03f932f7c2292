"""What both engines do with a module's parameters and an optimizer's state. Nothing here knows how
they are sharded: `whole` is a block inside which some parameters are whole on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pocl_ds.errors import ArtifactError
from pocl_ds.runtime import distributed

Whole: TypeAlias = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[Any]]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases and norms (METHOD 2). Shapes come from ZeRO's record
    where it sharded.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def frozen_names(module: nn.Module) -> set[str]:
    """Every name of the parameters that are not trained. Checkpoints leave them out: they are those
    of the model's folder.
    """
    return {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }


def load_all_but(absent: set[str], state: dict[str, Tensor], module: nn.Module) -> None:
    """Load a state in which these names may be missing. Raises ArtifactError for any other
    difference.
    """
    found = module.load_state_dict(state, strict=False)
    wrong = sorted({*found.missing_keys} - absent | {*found.unexpected_keys})
    if wrong:
        raise ArtifactError(
            f"the checkpoint and the student differ in {wrong[0]}: remove the checkpoint, or undo "
            f"the change to "
            "the student"
        )


def clear_moments(optimizer: torch.optim.Optimizer) -> None:
    """Set an Adam's moments and step counts to zero, in place: shards and checkpoints keep their
    layout.
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


def copied(state: Any) -> Any:
    """A tree of dictionaries, lists and tuples with its tensors copied into the CPU's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, copied(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(copied(value) for value in state)
    return state


def weights(module: nn.Module, whole: Whole) -> Iterator[tuple[str, Tensor]]:
    """See `Engine.weights`."""
    for name, parameter in module.named_parameters():
        with whole([parameter]):
            taken = parameter.detach().clone()
        yield name, taken


def whole_state(module: nn.Module, whole: Whole) -> dict[str, Tensor]:
    """See `Engine.state`."""
    state: dict[str, Tensor] = {}
    keep = distributed.rank() == 0
    for name, parameter in module.named_parameters():
        with whole(
            [parameter]
        ):  # one at a time: at most one parameter more than the shards is held
            if keep:
                state[name] = parameter.detach().cpu().clone()
    if keep:
        persistent = set(module.state_dict()) - {
            name for name, _ in module.named_parameters(remove_duplicate=False)
        }
        state.update(
            {
                name: b.detach().cpu().clone()
                for name, b in module.named_buffers()
                if name in persistent
            }
        )
    return state


def in_place(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """`whole` where nothing is sharded."""
    return contextlib.nullcontext()
