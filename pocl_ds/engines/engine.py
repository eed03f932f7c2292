"""Engines: what holds a model's shards, runs its backward and updates it.

Two behind one protocol: DeepSpeed ZeRO, for work; plain PyTorch, the numerical reference. The
trainer hands over loss *sums*; `backward` is the one place that turns them into the mean over the
optimizer step's loss tokens. DeepSpeed averages gradients over ranks, so the sum is multiplied by
the number of ranks; accumulation is driven from here (the boundary is set by hand), so DeepSpeed
divides by nothing else.

This is the only file that imports deepspeed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pocl_ds.config import TrainConfig
from pocl_ds.engines.parameters import (
    clear_moments,
    copied,
    frozen_names,
    in_place,
    load_all_but,
    parameter_groups,
    weights,
    whole_state,
)
from pocl_ds.engines.safe_unpickling import data_only, pickle_by_value
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.runtime import distributed

log = logging.getLogger("pocl_ds")

# What the names of rotary positions' buffers hold in every family of transformers.
INVERSE_FREQUENCIES = "inv_freq"

Write: TypeAlias = Callable[[], list[Path]]


class Engine(Protocol):
    """A student under training. Every method is called by all ranks together."""

    module: nn.Module

    def __call__(self, *args: Any) -> Any:
        """The module's forward."""

    def backward(self, loss_sum: Tensor, *, normaliser: int, last: bool) -> None:
        """Accumulate gradients of loss_sum / normaliser; `last` marks the step's last micro-batch."""

    def step(self, lr: float) -> float:
        """Clip, update with this learning rate, clear gradients. Returns the gradient norm before
        clipping.

        Where that is not finite, neither weights nor optimizer change.
        """

    def restart_optimizer(self) -> None:
        """Forget the optimizer's moments and step count, keep the weights."""

    def snapshot(self, directory: Path, *, copy: bool) -> Write:
        """Take this rank's part of weights and optimizer. The function that comes back writes it
        below `directory`, which exists, and names the files; it waits for no other rank, and raises
        OSError or RuntimeError.

        copy: take it to the CPU's memory, so that training can go on while it is written.
        """

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        """Read what a snapshot wrote with the same number of ranks, or what `reshard` made of it."""

    def reshard(self, source: Path, target: Path) -> None:
        """Rewrite what snapshots wrote below `source` so that any number of ranks can load it. One
        rank alone calls it.
        """

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """Whole weights of a part of the module, on the CPU, on rank 0; empty elsewhere."""

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters of a part of the module, one after another, copies, on every rank; tied
        ones once.
        """


class DeepSpeedEngine:
    """A student sharded by DeepSpeed ZeRO."""

    def __init__(self, module: nn.Module, train: TrainConfig, ds_config: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.runtime.zero import stage3

        self.zero_stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        if distributed.world_size() == 1:
            # Alone, a rank would join, scale and copy its gradients only to get them back.
            # DeepSpeed looks the function up in its module, and a process that is alone stays so:
            # this is right for every engine in it.
            stage3.reduce_scatter_coalesced = lambda tensors, group=None: [
                tensor.view(-1) for tensor in tensors
            ]
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, train.weight_decay),
            config=ds_config,
        )
        distributed.be_patient(train.hang_timeout_seconds)
        self.module = module
        self.ranks = distributed.world_size()
        # It puts a script into every checkpoint, between two barriers, where a full disk would
        # leave the other ranks waiting.
        self.engine._copy_recovery_script = lambda *_: None
        self.weight_decays = [group["weight_decay"] for group in self.engine.optimizer.param_groups]
        self.frozen = frozen_names(module)

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss_sum: Tensor, *, normaliser: int, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss_sum * (self.ranks / normaliser), scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        # DeepSpeed leaves an update with a non-finite gradient out by itself, and keeps the norm of
        # the step before.
        return (
            float(self.engine.get_global_grad_norm())
            if self.engine.was_step_applied()
            else math.inf
        )

    def restart_optimizer(self) -> None:
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        clear_moments(inner)

    def snapshot(self, directory: Path, *, copy: bool) -> Write:
        """See `Engine`. DeepSpeed meets in barriers between its files, where a rank that cannot
        write would leave the others waiting: so nothing is written before all states are taken.
        """
        writer, write = self.engine.checkpoint_engine, self.engine.checkpoint_engine.save
        taken: list[tuple[Any, str]] = []

        def take(state_dict: Any, path: str) -> None:
            if (
                self.frozen and "module" in state_dict
            ):  # DeepSpeed itself leaves out one name of a weight that has two
                state_dict["module"] = {
                    key: part
                    for key, part in state_dict["module"].items()
                    if key not in self.frozen
                }
            taken.append((copied(state_dict) if copy else state_dict, path))

        writer.save = take
        try:
            self.engine.save_checkpoint(
                str(directory),
                tag="zero",
                save_latest=False,
                exclude_frozen_parameters=bool(self.frozen),
            )
        finally:
            del writer.save  # the class's own method shows again

        def write_all() -> list[Path]:
            for state, path in taken:
                write(state, path)
            return [Path(path) for _, path in taken]

        return write_all

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        self.engine._config.load_universal_checkpoint = resharded
        try:
            with _data_only(directory):
                path, _ = self.engine.load_checkpoint(
                    str(directory),
                    tag="universal" if resharded else "zero",
                    custom_load_fn=self._load_module,
                )
        finally:
            self.engine._config.load_universal_checkpoint = False
        if path is None:
            raise ArtifactError(
                f"DeepSpeed found no checkpoint in {directory}: remove it, training goes on from "
                f"the one before"
            )
        if resharded:
            self._mend_universal_load()

    def _load_module(self, src: dict[str, Tensor], dst: nn.Module) -> None:
        """What DeepSpeed does with a checkpoint's module, where frozen weights are not in it."""
        load_all_but(self.frozen, src, dst)

    def _mend_universal_load(self) -> None:
        """Undo what DeepSpeed's universal load does to an Adam with several parameter groups.

        Every group gets the first one's values, so that biases and norms would decay; and all
        states share one step counter, which torch counts up in place once a group, and which is on
        the CPU, where a GPU's fused kernel cannot read it.
        """
        for group, decay in zip(
            self.engine.optimizer.param_groups, self.weight_decays, strict=True
        ):
            group["weight_decay"] = decay
        for parameter, state in self.engine.optimizer.optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device, copy=True)

    def reshard(self, source: Path, target: Path) -> None:
        if self.zero_stage != 3:
            raise ArtifactError(
                f"a checkpoint of ZeRO stage {self.zero_stage} cannot change its number of ranks: "
                f"start with as many as before, "
                "or use a ds_config of stage 3"
            )
        from deepspeed.checkpoint import ds_to_universal

        workers = max(1, (os.cpu_count() or 1) // 2)
        options = argparse.Namespace(
            input_folder=str(source / "zero"),
            output_folder=str(target / "universal"),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        with contextlib.redirect_stdout(io.StringIO()), _data_only(source):
            ds_to_universal.main(options)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        return whole_state(module, self._whole)

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return weights(module, self._whole)

    def _whole(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        return gather_parameters(parameters) if self.zero_stage == 3 else contextlib.nullcontext()


class TorchEngine:
    """A student whole on every rank; gradients are summed over ranks. The reference for tests."""

    def __init__(self, module: nn.Module, train: TrainConfig) -> None:
        distributed.be_patient(train.hang_timeout_seconds)
        self.module = module.to(distributed.device())
        self.clip = train.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, train.weight_decay),
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.frozen = frozen_names(module)

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss_sum: Tensor, *, normaliser: int, last: bool) -> None:
        (loss_sum / normaliser).backward()
        if last and dist.is_initialized():
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad)

    def step(self, lr: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def restart_optimizer(self) -> None:
        clear_moments(self.optimizer)

    def snapshot(self, directory: Path, *, copy: bool) -> Write:
        if distributed.rank():
            return list
        module = {
            name: part for name, part in self.module.state_dict().items() if name not in self.frozen
        }
        live = {"module": module, "optimizer": self.optimizer.state_dict()}
        state, path = copied(live) if copy else live, directory / "torch.pt"

        def write() -> list[Path]:
            torch.save(state, path)
            return [path]

        return write

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        state = torch.load(directory / "torch.pt", map_location="cpu", weights_only=True)
        load_all_but(self.frozen, state["module"], self.module)
        self.optimizer.load_state_dict(state["optimizer"])

    def reshard(self, source: Path, target: Path) -> None:
        shutil.copy2(source / "torch.pt", target)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        return whole_state(module, in_place)

    def weights(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return weights(module, in_place)


class FrozenEngine:
    """A model that only runs forward: the teacher. Sharded by ZeRO-3 where a configuration is
    given.
    """

    def __init__(self, module: nn.Module, ds_config: dict[str, Any] | None) -> None:
        module.eval().requires_grad_(False)
        self.sharded = ds_config is not None
        if ds_config is None:
            where = (
                distributed.device()
            )  # a quantised model is there already, and must not be moved
            self.module: Any = (
                module
                if all(part.device == where for part in module.parameters())
                else module.to(where)
            )
            return
        import deepspeed

        self.module, *_ = deepspeed.initialize(model=module, config=ds_config)

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def whole(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Hold some parameters whole on every rank inside a block."""
        return gather_parameters(parameters) if self.sharded else contextlib.nullcontext()


def start_deepspeed() -> None:
    """Join the process group, once, in the way DeepSpeed wants it; checkpoints that it writes are
    data (see `_data_only`).
    """
    import deepspeed
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if dist.is_initialized():
        return
    pickle_by_value(ZeroStageEnum)
    on_cpu = distributed.device().type == "cpu"
    if on_cpu:
        # The shared-memory collectives would be compiled for minutes; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        if distributed.world_size() > 1:
            raise ResourceError("MASTER_PORT is not set: start ranks through launch/train.sh")
        os.environ["MASTER_PORT"] = "0"
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else "nccl", verbose=False, timeout=distributed.be_patient()
    )
    if on_cpu:
        _keep_gloo_from_teams()


def _keep_gloo_from_teams() -> None:
    """Make gloo's own threads copy tensors alone, all ranks together.

    Else the first large gather gives each of them an OpenMP team. With more such threads than cores
    OpenMP stops spinning between operations, also in the training's own team, where then every
    small operation waits for a thread to wake up: steps took up to 1.2 times as long. A thread
    keeps the number it saw at its first parallel operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    part = torch.zeros(1 << 16)  # torch shares out what is larger than half of this
    whole = torch.zeros(len(part) * distributed.world_size())
    for work in [
        dist.all_gather_into_tensor(whole, part, async_op=True) for _ in range(16)
    ]:  # so that no thread has none
        work.wait()
    torch.set_num_threads(threads)


def _data_only(directory: Path) -> contextlib.AbstractContextManager[None]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # All that it writes beside tensors and plain values; the last by stage 2.
    return data_only(directory, LossScaler, ZeroStageEnum, fragment_address)


@contextlib.contextmanager
def sharded_loading(ds_config: dict[str, Any] | None) -> Iterator[None]:
    """Inside, `from_pretrained` builds a model in shards (zero.Init): no rank ever holds it whole.

    zero.Init makes each float tensor one of the weights' type. bfloat16 would change the inverse
    frequencies of rotary positions by up to 2%: they stay in float32, as in a model that is loaded
    whole, beside what the model or the configuration names.
    """
    if ds_config is None or ds_config.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    from deepspeed.runtime.zero import partition_parameters
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    named = partition_parameters.keep_in_fp32_pattern

    def kept(module: nn.Module, setting: Any, dtype: torch.dtype) -> re.Pattern[str]:
        others = named(module, setting, dtype)
        return re.compile(
            f"{INVERSE_FREQUENCIES}|{others.pattern}" if others else INVERSE_FREQUENCIES
        )

    partition_parameters.keep_in_fp32_pattern = kept
    keep = HfDeepSpeedConfig(ds_config)  # transformers holds only a weak reference
    try:
        yield
    finally:
        partition_parameters.keep_in_fp32_pattern = named
        unset_hf_deepspeed_config()
        del keep


@contextlib.contextmanager
def gather_parameters(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hold sharded parameters whole on every rank inside the block."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def seed_step(seed: int, step: int, micro: int) -> None:
    """Give dropout its random numbers as a function of seed, step, micro-batch and rank: nothing to
    save, nothing to lose.
    """
    words = np.random.SeedSequence([seed, step, micro, distributed.rank()]).generate_state(
        2, np.uint64
    )
    torch.manual_seed(int(words[0] >> 1))
    random.seed(int(words[1]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
