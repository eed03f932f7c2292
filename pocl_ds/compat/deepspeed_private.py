"""Private names of DeepSpeed that this package uses, seen in DeepSpeed 0.19.8.

tests/unit/compat/test_deepspeed_private.py fails when one of them changes. Where no upstream
issue is named, none is known. deepspeed is imported inside the functions, so that a run with the
plain engine does not need it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Part of the names of rotary position buffers in every family of transformers.
INVERSE_FREQUENCIES = "inv_freq"


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter before ZeRO-3 partitioned it: `ds_shape`. A partitioned parameter is
    empty. Also for parameters that are not partitioned.
    """
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def skip_reduction_of_single_rank() -> None:
    """Skip ZeRO-3's reduction of gradients if there is only one rank.

    With one rank it would concatenate, scale and copy the gradients without changing them. The
    function is looked up in its module, so this applies to every engine of the process.
    """
    from deepspeed.runtime.zero import stage3

    stage3.reduce_scatter_coalesced = lambda tensors, group=None: [
        tensor.view(-1) for tensor in tensors
    ]


def disable_recovery_script(engine: Any) -> None:
    """Do not copy `zero_to_fp32.py` into every checkpoint.

    DeepSpeed copies it on rank 0 between two barriers: with a full disk rank 0 fails and the other
    ranks wait.
    """
    engine._copy_recovery_script = lambda *_: None


@contextlib.contextmanager
def intercept_checkpoint_files(
    engine: Any, collect: Callable[[Any, str], None]
) -> Iterator[Callable[[Any, str], None]]:
    """Within the block `save_checkpoint` passes each file's state and path to `collect` instead of
    writing it. Yields DeepSpeed's own function for writing one file.

    DeepSpeed enters a barrier between files: a rank that cannot write would leave the others
    waiting. `collect` must name its arguments state_dict and path, as DeepSpeed does.
    """
    writer = engine.checkpoint_engine
    save = writer.save
    writer.save = collect
    try:
        yield save
    finally:
        del writer.save  # restores the method of the class


@contextlib.contextmanager
def universal_checkpoint(engine: Any, *, enabled: bool) -> Iterator[None]:
    """Within the block `load_checkpoint` reads a universal checkpoint, if enabled.

    DeepSpeed has a public setting for this, but only in the configuration that an engine starts
    with, before it is known with how many ranks the checkpoint was written.
    """
    engine._config.load_universal_checkpoint = enabled
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def convert_to_universal(source: Path, target: Path, *, workers: int) -> None:
    """Convert the ZeRO-3 checkpoint in `source` to a universal one in `target`.

    DeepSpeed documents this as a command line; its `main` takes the parsed arguments.
    """
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)


def repair_universal_load(engine: Any, weight_decays: list[float]) -> None:
    """Repair what loading a universal checkpoint changes in an Adam with several parameter groups.

    Every group gets the values of the first one, so that biases and norms would decay. All states
    share one step counter, which torch increments in place once per group; and it is on the CPU,
    where the fused kernel of a GPU cannot read it. Upstream change that brought the conversion for
    ZeRO-3: https://github.com/deepspeedai/DeepSpeed/pull/5475
    """
    for group, decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = decay
    for parameter, state in base_optimizer(engine).state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's ZeRO optimizer, whose state holds the moments."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def forget_module(module: nn.Module) -> None:
    """Remove a module from the list of the modules that ZeRO-3 has hooks in: `destroy` of its
    engine leaves it there, and its parameters would never be freed.
    """
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]


def checkpoint_classes() -> tuple[type, ...]:
    """The classes that DeepSpeed pickles into checkpoints besides tensors and plain values; the
    last one only in ZeRO stage 2. `torch.load` must be allowed to build them.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return LossScaler, zero_stage_enum(), fragment_address


def zero_stage_enum() -> type[Enum]:
    """The enumeration of ZeRO stages, which DeepSpeed pickles into checkpoints."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    stages: type[Enum] = ZeroStageEnum
    return stages


def disable_shared_memory_collectives() -> None:
    """Use gloo instead of DeepSpeed's shared-memory collectives on CPUs, which would be compiled
    for minutes when the process group starts.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def keep_rotary_frequencies_in_float32() -> Iterator[None]:
    """Within the block zero.Init leaves the inverse frequencies of rotary positions in float32,
    besides what the model or the configuration names.

    zero.Init casts each float tensor to the type of the weights. bfloat16 changes these frequencies
    by up to 2%; a model that is loaded without zero.Init has them in float32. Upstream issue:
    https://github.com/deepspeedai/DeepSpeed/issues/4932
    """
    from deepspeed.runtime.zero import partition_parameters

    original = partition_parameters.keep_in_fp32_pattern

    def pattern_with_frequencies(
        module: nn.Module, setting: Any, dtype: torch.dtype
    ) -> re.Pattern[str]:
        pattern = original(module, setting, dtype)
        names = f"{INVERSE_FREQUENCIES}|{pattern.pattern}" if pattern else INVERSE_FREQUENCIES
        return re.compile(names)

    partition_parameters.keep_in_fp32_pattern = pattern_with_frequencies
    try:
        yield
    finally:
        partition_parameters.keep_in_fp32_pattern = original
