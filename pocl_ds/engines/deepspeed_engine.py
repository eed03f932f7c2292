"""The DeepSpeed engine: students sharded by ZeRO, frozen models sharded by ZeRO-3, the process
group.

DeepSpeed averages gradients over ranks, so the loss sum is multiplied by the number of ranks.
This module controls gradient accumulation (it sets the boundary), so DeepSpeed does not divide by
the number of micro-batches.

Besides compat/deepspeed_private.py this is the only file that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pocl_ds.compat import deepspeed_private
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
from pocl_ds.engines.safe_unpickling import data_only, pickle_by_value
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.runtime import distributed
from pocl_ds.runtime.job_roles import job_roles

# Names of the subdirectories of a checkpoint, DeepSpeed's tags.
CHECKPOINT_TAG, UNIVERSAL_TAG = "zero", "universal"


class DeepSpeedEngine:
    """A student sharded by DeepSpeed ZeRO. Methods: see `Engine`."""

    def __init__(self, module: nn.Module, train: TrainConfig, ds_config: dict[str, Any]) -> None:
        import deepspeed

        self.zero_stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        if distributed.world_size() == 1:
            deepspeed_private.skip_reduction_of_single_rank()
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, train.weight_decay),
            config=ds_config,
        )
        distributed.set_process_group_timeout(train.hang_timeout_seconds)
        deepspeed_private.disable_recovery_script(self.engine)
        self.module, self.forward = module, self.engine
        self.ranks = distributed.world_size()
        self.weight_decays = [group["weight_decay"] for group in self.engine.optimizer.param_groups]
        self.frozen = frozen_names(module)

    def backward(self, loss_sum: Tensor, *, normalizer: float, is_last: bool) -> None:
        """See `Engine`."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss_sum * (self.ranks / normalizer), scale_wrt_gas=False)

    def step(self, lr: float) -> float | Tensor:
        """See `Engine`. DeepSpeed itself skips an update with a non-finite gradient, and then still
        reports the norm of the step before. Its decision is the one point of an optimizer step at
        which the host waits for the GPU.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if not self.engine.was_step_applied():
            return math.inf
        norm: float | Tensor = self.engine.get_global_grad_norm()
        return norm

    def restart_optimizer(self) -> None:
        """See `Engine`."""
        reset_optimizer_state(deepspeed_private.base_optimizer(self.engine))

    def snapshot(self, directory: Path, *, copy: bool) -> WriteFiles:
        """See `Engine`. No file is written before every rank has passed DeepSpeed's barriers."""
        files: list[tuple[Any, str]] = []

        def collect(state_dict: Any, path: str) -> None:
            if self.frozen and "module" in state_dict:
                # DeepSpeed leaves out only one name of a tied frozen weight.
                weights = state_dict["module"].items()
                state_dict["module"] = {k: v for k, v in weights if k not in self.frozen}
            files.append((copy_to_cpu(state_dict) if copy else state_dict, path))

        with deepspeed_private.intercept_checkpoint_files(self.engine, collect) as write_file:
            self.engine.save_checkpoint(
                str(directory),
                tag=CHECKPOINT_TAG,
                save_latest=False,
                exclude_frozen_parameters=bool(self.frozen),
            )

        def write() -> list[Path]:
            for state, path in files:
                write_file(state, path)
            return [Path(path) for _, path in files]

        return write

    def load(self, directory: Path, *, resharded: bool = False) -> None:
        """See `Engine`."""
        universal = deepspeed_private.universal_checkpoint(self.engine, enabled=resharded)
        with universal, _only_data(directory):
            path, _ = self.engine.load_checkpoint(
                str(directory),
                tag=UNIVERSAL_TAG if resharded else CHECKPOINT_TAG,
                custom_load_fn=self._load_module,
            )
        if path is None:
            raise ArtifactError(
                f"DeepSpeed found no checkpoint in {directory}: remove it, and training resumes "
                f"from the previous one"
            )
        if resharded:
            deepspeed_private.repair_universal_load(self.engine, self.weight_decays)

    def _load_module(self, src: dict[str, Tensor], dst: nn.Module) -> None:
        """Load a module whose frozen weights are missing from the checkpoint. DeepSpeed passes both
        arguments by name.
        """
        load_trained_state(dst, src, self.frozen)

    def reshard(self, source: Path, target: Path) -> None:
        """See `Engine`."""
        if self.zero_stage != 3:
            raise ArtifactError(
                f"a checkpoint of zero_stage {self.zero_stage} cannot change its number of ranks: "
                f"start with as many ranks as before, or use a ds_config with zero_stage 3"
            )
        workers = max(1, (os.cpu_count() or 1) // 2)
        with _only_data(source):
            deepspeed_private.convert_to_universal(
                source / CHECKPOINT_TAG, target / UNIVERSAL_TAG, workers=workers
            )

    def gathered_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """See `Engine`."""
        return full_state_dict(module, gather_parameters if self.zero_stage == 3 else keep_in_place)

    def gathered_master_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_fp32_param

        gather = gather_parameters if self.zero_stage == 3 else keep_in_place
        return full_master_state_dict(
            module,
            gather,
            lambda weight: safe_get_full_fp32_param(weight) if weight.requires_grad else None,
        )

    def gathered_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        gather = gather_parameters if self.zero_stage == 3 else keep_in_place
        return iterate_parameters(module, gather)


def shard_frozen_module(module: nn.Module, ds_config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around a module that only runs forward."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, config=ds_config)
    return engine


def release_frozen_module(engine: Any) -> None:
    """Undo `shard_frozen_module`: without its hooks the module is freed with its last owner."""
    engine.destroy()
    deepspeed_private.forget_module(engine.module)


def start_deepspeed() -> None:
    """Join the process group through DeepSpeed, once per process.

    Raises ResourceError if ranks were started without MASTER_PORT.
    """
    import deepspeed

    if dist.is_initialized():
        return
    # Checkpoints must stay loadable as data; see `_only_data`.
    pickle_by_value(deepspeed_private.zero_stage_enum())
    # gloo between CPUs, NCCL between GPUs.
    on_cpu = distributed.device().type == "cpu"
    if on_cpu:
        deepspeed_private.disable_shared_memory_collectives()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A process that no launcher started is the only rank.
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
    backend, timeout = "gloo" if on_cpu else "nccl", distributed.set_process_group_timeout()
    if roles := job_roles():
        # DeepSpeed takes over a process group that exists.
        dist.init_process_group(
            backend,
            store=roles.own_store,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            timeout=timeout,
        )
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    if on_cpu:
        _limit_gloo_to_single_threads()


def _limit_gloo_to_single_threads() -> None:
    """Make each of gloo's own threads copy tensors with one OpenMP thread; all ranks call it
    together.

    Otherwise the first large gather gives each of them an OpenMP team. With more such threads than
    cores OpenMP stops spinning between operations, also in the training's own team, and every small
    operation waits for a thread to wake up: steps took up to 1.2 times as long. A thread keeps the
    number that it saw at its first parallel operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shard = torch.zeros(1 << 16)  # torch parallelizes operations on more than half of this
    gathered = torch.zeros(len(shard) * distributed.world_size())
    # Enough gathers at once that every thread of gloo runs one.
    for work in [dist.all_gather_into_tensor(gathered, shard, async_op=True) for _ in range(16)]:
        work.wait()
    torch.set_num_threads(threads)


def _only_data(directory: Path) -> contextlib.AbstractContextManager[None]:
    return data_only(directory, *deepspeed_private.checkpoint_classes())


@contextlib.contextmanager
def sharded_loading(ds_config: dict[str, Any] | None) -> Iterator[None]:
    """Within the block `from_pretrained` builds a model in shards (zero.Init), so that no rank ever
    holds the full model. Does nothing without a configuration of zero_stage 3.
    """
    if ds_config is None or ds_config.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    with deepspeed_private.keep_rotary_frequencies_in_float32():
        reference = HfDeepSpeedConfig(ds_config)  # transformers holds only a weak reference
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del reference


def gather_as_one(module: nn.Module) -> None:
    """Let ZeRO-3 gather all parameters of a module before its forward, rather than those of each
    submodule before the submodule's. Call it before DeepSpeed shards or wraps the module.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


@contextlib.contextmanager
def gather_parameters(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block sharded parameters are complete on every rank."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield
