"""Measures contenders of a part `steps-PAIR`, one after another, once it has read a line.

    launch/pocl.py pocl_ds.bench.gpu.steps_worker ROWS FOLDER PAIR VARIANT...

The models are made on the device with random weights: FOLDER holds their configurations and a
tokenizer only.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import unset_hf_deepspeed_config

from pocl_ds.bench.gpu.estimates import UTILIZATION, StepEstimate, estimate_step, peak_flops
from pocl_ds.bench.gpu.pairs import find_pair
from pocl_ds.bench.gpu.rows import Row, RowWriter, require_package
from pocl_ds.bench.gpu.steps import CONTENDERS
from pocl_ds.bench.peak_memory import peak_bytes, reset_peak
from pocl_ds.bench.step_worker import model_configs, time_plain_loop, time_trainer
from pocl_ds.bench.workloads import Workload, random_samples, write_configs
from pocl_ds.config import StudentConfig, TeacherConfig
from pocl_ds.models.dropout import set_dropout
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.load import load_model_config, load_tokenizer
from pocl_ds.models.quiet import quiet
from pocl_ds.runtime import distributed
from pocl_ds.runtime.logs import setup_logging

WARM_UP_STEPS, STEPS = 2, 4
DRY_RUN_STEPS = 2
TEACHER_MODES = {"zero3": "online", "zero3+cached": "cached_hidden_states", "zero3+sft": "none"}


def random_model(
    path: str, config: StudentConfig | TeacherConfig, dropout: float | None = None
) -> Any:
    """The model of the configuration in a folder, with random weights that follow from the folder's
    name. See `ModelLoader`.
    """
    # In the parts of one rank there is nothing to shard while the model is made.
    unset_hf_deepspeed_config()
    model_config = load_model_config(path)
    if dropout is not None:
        set_dropout(model_config, dropout)
    torch.manual_seed(sum(Path(path).name.encode()))
    with quiet(), distributed.device():
        return AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, resolve_dtype(config.dtype)),
            attn_implementation=config.attn_implementation,
        ).eval()


def measure_contender(
    variant: str, work: Workload, folder: Path, steps: int, expected: StepEstimate
) -> Row:
    """Seconds, throughput and memory of a contender's steps, and their ratios to the estimate."""
    mode, losses = TEACHER_MODES.get(variant), list[float]()
    if variant == "trl":
        seconds = time_trl(work, folder, WARM_UP_STEPS + steps)
    else:
        if mode:
            require_package("deepspeed")
        time_steps = time_trainer if mode else time_plain_loop
        seconds, losses = time_steps(
            variant, work, folder, WARM_UP_STEPS + steps, load=random_model
        )
    peak, seconds = peak_bytes(distributed.device()), seconds[WARM_UP_STEPS:]
    tokens_per_second = work.tokens / statistics.median(seconds)
    row = {
        "seconds": seconds,
        "losses": losses,
        "tokens": work.tokens,
        "loss_tokens": work.loss_tokens,
        "peak_bytes": peak,
        "tokens_per_second": tokens_per_second,
        "mfu": expected.flops / statistics.median(seconds) / peak_flops(),
    }
    if mode:  # `pocl estimate` is about this package
        estimated_seconds = expected.flops / (UTILIZATION * peak_flops())
        row |= {
            "estimated_bytes": expected.memory,
            "memory_ratio": peak / expected.memory,
            "speed_ratio": tokens_per_second * estimated_seconds / work.tokens,
        }
    return row


def time_trl(work: Workload, folder: Path, steps: int) -> list[float]:
    """Seconds of the steps of TRL's GKD trainer. Raises NotAvailable without TRL."""
    require_package("trl")
    from pocl_ds.bench.trl_worker import time_trainer as time_trl_trainer

    reset_peak(distributed.device())
    student, teacher = (
        random_model(config.model, config) for config in model_configs(folder, "sdpa")
    )
    (batch,) = random_samples(work, 1)
    tokenizer = load_tokenizer(str(folder / "student"))
    return time_trl_trainer(student.train(), teacher, tokenizer, batch, folder, steps)


def main(rows: RowWriter, folder: Path, pair: str, variants: list[str]) -> None:
    """Write a row for each variant."""
    on_gpu = distributed.device_type() == "cuda"
    work = find_pair(pair, on_gpu=on_gpu)
    steps = STEPS if on_gpu else DRY_RUN_STEPS
    if not any(folder.iterdir()):
        with quiet():
            paths = write_configs(work, folder)
        for path in paths:  # a folder without a file of weights is no model
            (path / "model.safetensors").touch()
    # Wait for the turn, with everything done that needs no GPU.
    expected = {
        variant: estimate_step(work, TEACHER_MODES.get(variant, "online")) for variant in variants
    }
    sys.stdin.readline()
    for variant in variants:
        measurement = partial(measure_contender, variant, work, folder, steps, expected[variant])
        rows.measure({"name": CONTENDERS[variant]}, measurement)
        for finished in folder.glob("run-*"):
            shutil.rmtree(finished)


if __name__ == "__main__":
    setup_logging(0, world_size=1)
    path, directory, pair_name, *names = sys.argv[1:]
    main(RowWriter(Path(path)), Path(directory), pair_name, names)
