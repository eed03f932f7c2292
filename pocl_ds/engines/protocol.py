"""The interface of a training engine: forward, backward, update, checkpoints.

The trainer passes loss *sums*; `Engine.backward` is the one place that turns them into the mean
over the optimizer step's loss tokens (docs/method.md, eq. 10). `deepspeed_engine` is the
implementation for production, `torch_engine` the numerical reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

# Writes the files of a checkpoint and returns their paths.
WriteFiles: TypeAlias = Callable[[], list[Path]]


class Engine(Protocol):
    """A student in training. All ranks call every method together."""

    module: nn.Module
    forward: Callable[..., Any]  # the module's forward

    def backward(self, loss_sum: Tensor, *, normalizer: float, is_last: bool) -> None:
        """Accumulate the gradients of loss_sum / normalizer; `is_last` marks the last micro-batch
        of an optimizer step.
        """

    def step(self, lr: float) -> float | Tensor:
        """Clip the gradients, update the weights with this learning rate, clear the gradients.

        Returns the gradient norm before clipping, a number or a tensor of one on the device. If it
        is not finite, neither weights nor optimizer change.
        """

    def restart_optimizer(self) -> None:
        """Reset the optimizer's moments and step count; the weights stay."""

    def snapshot(self, directory: Path, *, copy: bool) -> WriteFiles:
        """Capture this rank's part of weights and optimizer.

        The returned function writes it to `directory`, which exists, and returns the files. It
        waits for no other rank, and raises OSError or RuntimeError. copy: copy the state to CPU
        memory, so that training can continue during the write.
        """

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        """Load what a snapshot wrote with the same number of ranks, or the result of `reshard`."""

    def reshard(self, source: Path, target: Path) -> None:
        """Rewrite the snapshots in `source` so that any number of ranks can load them. Only one
        rank calls it.
        """

    def gathered_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The full weights of a part of the module, on the CPU of rank 0; empty on other ranks."""

    def gathered_master_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """Like `gathered_state_dict`, in float32: the optimizer's master weights, and the values of
        parameters without one.
        """

    def gathered_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The full parameters of a part of the module, one after another, as copies on every rank;
        tied ones once.
        """
