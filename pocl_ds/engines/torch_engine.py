"""The plain PyTorch engine: the full student on every rank. The numerical reference for tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pocl_ds.config import TrainConfig
from pocl_ds.engines.parameters import (
    copy_to_cpu,
    frozen_names,
    full_master_state_dict,
    full_state_dict,
    iterate_parameters,
    keep_in_place,
    load_trained_state,
    parameter_groups,
    reset_optimizer_state,
)
from pocl_ds.engines.protocol import WriteFiles
from pocl_ds.runtime import distributed

CHECKPOINT_FILE = "torch.pt"


class TorchEngine:
    """A student whose gradients are summed over ranks. Methods: see `Engine`."""

    def __init__(self, module: nn.Module, train: TrainConfig) -> None:
        distributed.set_process_group_timeout(train.hang_timeout_seconds)
        self.module = self.forward = module.to(distributed.device())
        self.max_grad_norm = train.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, train.weight_decay),
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.frozen = frozen_names(module)

    def backward(self, loss_sum: Tensor, *, normalizer: float, is_last: bool) -> None:
        """See `Engine`."""
        (loss_sum / normalizer).backward()
        if is_last and dist.is_initialized():
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad)

    def step(self, lr: float) -> Tensor:
        """See `Engine`. The fused optimizer skips the update on the device itself."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The argument that a GradScaler sets: 1 changes neither weights nor moments nor step count.
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def restart_optimizer(self) -> None:
        """See `Engine`."""
        reset_optimizer_state(self.optimizer)

    def snapshot(self, directory: Path, *, copy: bool) -> WriteFiles:
        """See `Engine`. Rank 0 writes for all."""
        if distributed.rank():
            return list
        weights = {
            name: value
            for name, value in self.module.state_dict().items()
            if name not in self.frozen
        }
        state = {"module": weights, "optimizer": self.optimizer.state_dict()}
        if copy:
            state = copy_to_cpu(state)

        def write() -> list[Path]:
            torch.save(state, directory / CHECKPOINT_FILE)
            return [directory / CHECKPOINT_FILE]

        return write

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        """See `Engine`."""
        state = torch.load(directory / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        load_trained_state(self.module, state["module"], self.frozen)
        self.optimizer.load_state_dict(state["optimizer"])

    def reshard(self, source: Path, target: Path) -> None:
        """See `Engine`."""
        shutil.copy2(source / CHECKPOINT_FILE, target)

    def gathered_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """See `Engine`."""
        return full_state_dict(module, keep_in_place)

    def gathered_master_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """See `Engine`. This engine updates the weights themselves."""
        return full_master_state_dict(module, keep_in_place, lambda _: None)

    def gathered_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        return iterate_parameters(module, keep_in_place)
