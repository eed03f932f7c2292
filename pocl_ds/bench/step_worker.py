"""One contender of `pocl bench step`, in its own process or ranks: it times optimizer steps over
one batch.

launch/train.sh --ranks R --threads T --module pocl_ds.bench.step_worker VARIANT WORKLOAD FOLDER
STEPS OUT

Variants: `zero3` (this package, DeepSpeed ZeRO-3) and `torch` (this package, plain PyTorch engine),
each also with a setting of the recipe: `zero3+checkpointing`, `zero3+padded`, `zero3+sdpa`,
`zero3+eager`, `zero3+equal_tokens` (micro-batches balanced by tokens), `zero3+sequence_parallel`
(all ranks share a micro-batch, with activation checkpointing), `torch+cached` (the teacher's hidden
states from disk), `torch+sft` (no teacher), or with a token rule, as `torch+adakd`, or
`torch+sample_weights`; `full` (all logits of both models, as research code does it), `sft` (the
student alone, from transformers), `idle` (ranks that have joined and hold no model).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from pocl_ds.bench.peak_memory import peak_bytes, reset_peak
from pocl_ds.bench.workloads import WORKLOADS, Workload, random_samples
from pocl_ds.config import (
    CheckpointConfig,
    LossConfig,
    StudentConfig,
    TeacherCacheConfig,
    TeacherConfig,
    TokenRuleConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.config.registry import TOKEN_RULES
from pocl_ds.curriculum.plan import Plan, build_plan
from pocl_ds.data.split_writer import save_split
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.models.recipe_model import ModelLoader, load_recipe_model
from pocl_ds.runtime import distributed, sequence_parallel
from pocl_ds.runtime.logs import setup_logging
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.teachers.cache_plan import CacheReference
from pocl_ds.teachers.cache_step import cache_teacher
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.training.build import build_trainer
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.trainer import Trainer
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.run_dir import RunDirectory

SFT_RATIO, LR = 0.3, 1e-4


class NoCheckpoints(Checkpoints):
    """Checkpoints of a training whose end is not needed."""

    def save(self, *_: Any, **__: Any) -> None:
        """Write nothing."""


def main(variant: str, work: Workload, folder: Path, steps: int, out: Path) -> None:
    """Time `steps` optimizer steps after one that does not count."""
    if variant == "idle":
        start_deepspeed()
        seconds, losses = [0.0], [0.0]
    else:
        time_steps = time_trainer if variant.startswith(("zero3", "torch")) else time_plain_loop
        seconds, losses = time_steps(variant, work, folder, steps + 1)
    peaks = distributed.gather_objects(peak_bytes(distributed.device()) / 2**20)
    if distributed.rank() == 0:
        result = {
            "seconds": seconds[1:],
            "peak_mib": sum(peaks),
            "peaks_mib": peaks,
            "loss": losses,
        }
        write_json(out, result)


def time_trainer(
    variant: str,
    work: Workload,
    folder: Path,
    steps: int,
    load: ModelLoader = load_recipe_model,
) -> tuple[list[float], list[float]]:
    """Seconds and losses of this package's trainer, as `pocl train` runs it. The peak memory is
    measured from the point where the data and a cached teacher's outputs are on disk.
    """
    run = RunDirectory(folder / f"run-{variant}-{distributed.world_size()}")
    samples = len(work.lengths)
    plan = build_plan(
        np.arange(samples),
        num_subsets=1,
        epochs_per_stage=steps,
        batch_size=samples,
        temperature=(1.0, 1.0),
        sft_ratio=(SFT_RATIO, SFT_RATIO),
        sample_weights=(
            np.linspace(0.5, 1.5, samples, dtype=np.float32)
            if variant.endswith("+sample_weights")
            else None
        ),
    )
    build = prepare_training(variant, work, folder, run, plan, load=load)
    reset_peak(distributed.device())
    trainer = build()
    if variant.endswith("+equal_tokens"):
        trainer.data.sample_flops = None
    saves = trainer.checkpoints
    trainer.checkpoints = NoCheckpoints(
        saves.directory, saves.config, fingerprint=saves.fingerprint, dtype=saves.dtype
    )
    trainer.run()
    records = read_metrics(run.train / "metrics.jsonl") if distributed.rank() == 0 else []
    return [record["seconds"] for record in records], [record["loss"] for record in records]


def prepare_training(
    variant: str,
    work: Workload,
    folder: Path,
    run: RunDirectory,
    plan: Plan,
    copies: int = 1,
    load: ModelLoader = load_recipe_model,
) -> Callable[[], Trainer]:
    """Write the data and, for a cached teacher, its outputs. The returned function builds the
    trainer.

    copies: how often the workload's samples are in the data, each time with other tokens. load:
    see `build_trainer`.
    """
    # Data, models and ranks.
    if distributed.rank() == 0:
        write_split(work, run.data, copies)
    engine, _, setting = variant.partition("+")
    student, teacher = model_configs(folder, setting)
    if engine == "zero3":
        start_deepspeed()
        distributed.barrier()
        if setting == "sequence_parallel":
            sequence_parallel.start(distributed.world_size())
    # The teacher's outputs, if they are cached.
    cache = CacheReference("bench") if setting == "cached" else None
    if cache:
        cache_teacher(
            run,
            teacher=teacher,
            student=student,
            config=TeacherCacheConfig(),
            usage=TeacherUsage(1.0),
            seed=0,
            fingerprint=cache.fingerprint,
            model_fingerprints={"teacher": cache.fingerprint},
            load=load,
        )
    training = describe_training(
        run,
        plan,
        len(work.lengths) * copies,
        student,
        teacher if setting != "sft" else None,
        _train_config(engine, setting, work),
        teacher_cache=cache,
        token_rule=setting if setting in TOKEN_RULES else None,
    )
    return lambda: build_trainer(run, training, load)


def describe_training(
    run: RunDirectory,
    plan: Plan,
    samples: int,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    train: TrainConfig,
    seed: int = 0,
    token_rule: str | None = None,
    **settings: Any,
) -> TrainingRun:
    """A training with forward KL, or without a teacher SFT, over samples in their own order.

    token_rule: by name, with its default options. settings: further fields of `TrainingRun`.
    """
    loss = LossConfig(
        name="fkl" if teacher else "sft",
        token_rule=TokenRuleConfig(name=token_rule) if token_rule else None,
    )
    return TrainingRun(
        run.train,
        "bench",
        "bench",
        plan,
        student.model,
        student,
        (teacher.model,) if teacher else (),
        teacher,
        loss,
        train,
        seed,
        **settings,
    )


def model_configs(folder: Path, setting: str) -> tuple[StudentConfig, TeacherConfig]:
    """The sections `student` and `teacher` of a recipe. setting: what follows a variant's `+`."""
    attention = setting if setting in ("sdpa", "eager") else "per_sample"
    common = {"dtype": model_dtype(), "attn_implementation": attention}
    student = {
        **common,
        "model": str(folder / "student"),
        "activation_checkpointing": setting in ("checkpointing", "sequence_parallel"),
    }
    teacher = {
        **common,
        "model": str(folder / "teacher"),
        "mode": "cached_hidden_states" if setting == "cached" else "online",
    }
    return StudentConfig.model_validate(student), TeacherConfig.model_validate(teacher)


def _train_config(engine: str, setting: str, work: Workload) -> TrainConfig:
    samples = len(work.lengths)
    return TrainConfig(
        engine="torch" if engine == "torch" else "deepspeed",
        batch_size=samples,
        layout="padded" if setting == "padded" else "auto",
        micro_batch_size=max(1, samples // sequence_parallel.data_parallel_size()),
        micro_batch_tokens=work.micro_batch_tokens,
        sequence_parallel_size=sequence_parallel.size(),
        lr=LR,
        validate_max_samples=0,
        checkpoint=CheckpointConfig(every_n_steps=10**9),
        tracking=TrackingConfig(tensorboard=False),
    )


def model_dtype() -> Literal["float32", "bfloat16"]:
    """The data type of models: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if distributed.device().type == "cuda" else "float32"


def write_split(work: Workload, folder: Path, copies: int = 1) -> None:
    """Write `copies` batches as a tokenized training split, and an empty validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [sample for batch in random_samples(work, copies) for sample in batch]
    for name, rows in (("train", samples), ("validation", [])):
        names = [f"s{i}" for i in range(len(rows))]
        save_split(folder, name, names, [ids for _, ids in rows], [prompt for prompt, _ in rows])


def time_plain_loop(
    variant: str,
    work: Workload,
    folder: Path,
    steps: int,
    load: ModelLoader = load_recipe_model,
) -> tuple[list[float], list[float]]:
    """Seconds and losses of a straightforward loop: padded, with every logit of both models at
    once.
    """
    device = distributed.device()
    reset_peak(device)
    student_config, teacher_config = model_configs(folder, "sdpa")
    student = load(student_config.model, student_config, None).to(device).train()
    teacher: Any = None
    if variant == "full":
        teacher = load(teacher_config.model, teacher_config, None).to(device)
        teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.01)
    ids, mask, labels = (tensor.to(device) for tensor in _padded_batch(work))
    compute_loss = _full_logits_loss if variant == "full" else _sft_loss
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = compute_loss(student, teacher, ids, mask, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def _padded_batch(work: Workload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels of the workload: each [samples, longest]."""
    batch = random_samples(work, 1)[0]
    width = max(len(ids) for _, ids in batch)
    ids = torch.full((len(batch), width), 2)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, tokens) in enumerate(batch):
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, :prompt] = -100
    return ids, mask, labels


def _full_logits_loss(
    student: Any, teacher: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    output = student(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    with torch.no_grad():
        target = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_q, log_p = functional.log_softmax(output.logits, -1), functional.log_softmax(target, -1)
    per_token = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[:, :-1]
    counts = labels[:, 1:] != -100
    kd: torch.Tensor = (per_token * counts).sum() / counts.sum()
    result: torch.Tensor = SFT_RATIO * output.loss + (1 - SFT_RATIO) * kd
    return result


def _sft_loss(
    student: Any, teacher: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    output = student(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    loss: torch.Tensor = output.loss
    return loss


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    name, workload, directory, count, result = sys.argv[1:]
    main(name, WORKLOADS[workload], Path(directory), int(count), Path(result))
