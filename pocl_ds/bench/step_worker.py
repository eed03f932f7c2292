"""One contender of `pocl bench step`, in its own process or ranks: times steps over one batch,
writes what it found.

launch/train.sh --ranks R --threads T --module pocl_ds.bench.step_worker VARIANT WORKLOAD FOLDER
STEPS OUT

Variants: zero3 (ours, DeepSpeed ZeRO-3), torch (ours, plain PyTorch engine), each also with one of
the recipe's switches (zero3+checkpointing, zero3+padded, zero3+sdpa, zero3+eager), with the
teacher's hidden states from disk (torch+stored) and without a teacher (torch+sft); full (all logits
of both sides, as research code does it), sft (the student alone, from transformers); idle (ranks
that have joined and hold no model).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from pocl_ds.bench.workloads import WORKLOADS, Workload, sequences
from pocl_ds.config import (
    CheckpointConfig,
    LossConfig,
    StudentConfig,
    TeacherCacheConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import Plan, single_stage_plan
from pocl_ds.engines.engine import start_deepspeed
from pocl_ds.models.load import load_model
from pocl_ds.runtime import distributed
from pocl_ds.runtime.tracking import read_metrics, setup_logging
from pocl_ds.teachers.cache_writer import teach
from pocl_ds.teachers.mode_selection import Use
from pocl_ds.training import build
from pocl_ds.training.trainer import Trainer
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.run_dir import RunDirectory

ALPHA, LR = 0.3, 1e-4


def main(variant: str, work: Workload, folder: Path, steps: int, out: Path) -> None:
    """Time `steps` steps after one that is not counted."""
    if variant == "idle":
        start_deepspeed()
        seconds, loss = [0.0], [0.0]
    else:
        measure = ours if variant.startswith(("zero3", "torch")) else plain
        seconds, loss = measure(variant, work, folder, steps + 1)
    on_gpu = distributed.device().type == "cuda"
    own = (
        torch.cuda.max_memory_allocated() / 2**20
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    peak = distributed.gather_objects(own)
    if distributed.rank() == 0:
        write_json(
            out, {"seconds": seconds[1:], "peak_mib": sum(peak), "peaks_mib": peak, "loss": loss}
        )


def ours(variant: str, work: Workload, folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """Our trainer, as `pocl train` runs it."""
    run = RunDirectory(folder / f"run-{variant}-{distributed.world_size()}")
    count = len(work.lengths)
    plan = single_stage_plan(
        np.arange(count), steps=steps, batch_size=count, temperature=1.0, sft_ratio=ALPHA
    )
    make_training(variant, work, folder, run, plan)().run()
    records = read_metrics(run.train / "metrics.jsonl") if distributed.rank() == 0 else []
    return [record["seconds"] for record in records], [record["loss"] for record in records]


def make_training(
    variant: str, work: Workload, folder: Path, run: RunDirectory, plan: Plan, copies: int = 1
) -> Callable[[], Trainer]:
    """The data and, for a stored teacher, what is kept of it are written now; the trainer is made
    when it is called for.

    copies: how often the workload's samples stand in the data, each time with other tokens.
    """
    if distributed.rank() == 0:
        write_split(work, run.data, copies)
    count = len(work.lengths)
    engine, _, switch = variant.partition("+")
    train = TrainConfig(
        engine="torch" if engine == "torch" else "deepspeed",
        batch_size=count,
        layout="padded" if switch == "padded" else "auto",
        micro_batch_size=max(1, count // distributed.world_size()),
        lr=LR,
        validate_max_samples=0,
        checkpoint=CheckpointConfig(every_n_steps=10**9),
        tracking=TrackingConfig(tensorboard=False),
    )
    kind = precision()
    attention = switch if switch in ("sdpa", "eager") else "per_sample"
    teacher = TeacherConfig.model_validate(
        {
            "model": str(folder / "teacher"),
            "dtype": kind,
            "attention": attention,
            "mode": "cached_hidden_states" if switch == "stored" else "online",
        }
    )
    student = StudentConfig.model_validate(
        {
            "model": str(folder / "student"),
            "dtype": kind,
            "attention": attention,
            "activation_checkpointing": switch == "checkpointing",
        }
    )
    if engine == "zero3":
        start_deepspeed()
        distributed.barrier()
    taught = "bench" if switch == "stored" else None
    if taught:
        teach(
            run,
            teacher=teacher,
            student=student,
            config=TeacherCacheConfig(),
            use=Use(1.0),
            fingerprint=taught,
        )
    asked = None if switch == "sft" else teacher
    loss = LossConfig(name="sft" if asked is None else "fkl")
    job = build.Job(
        run.train,
        "bench",
        "bench",
        plan,
        np.arange(count * copies),
        student.model,
        student,
        (asked.model,) if asked else (),
        asked,
        loss,
        train,
        0,
        taught=taught,
    )
    return lambda: build.make_trainer(run, job)


def precision() -> Literal["float32", "bfloat16"]:
    """What models are held in: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if distributed.device().type == "cuda" else "float32"


def write_split(work: Workload, folder: Path, copies: int = 1) -> None:
    """So many batches as an encoded split, one sample a row, and an empty validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = [sample for one in sequences(work, copies) for sample in one]
    for name, samples in (("train", batch), ("validation", [])):
        sizes = np.array([len(ids) for _, ids in samples], np.int64)
        index = np.stack(
            [
                np.cumsum(sizes) - sizes,
                np.array([prompt for prompt, _ in samples], np.int64),
                sizes,
            ],
            1,
        )
        np.save(folder / f"{name}.index.npy", index.reshape(-1, 3))
        np.save(
            folder / f"{name}.ids.npy",
            np.array([f"s{i}".encode() for i in range(len(samples))], "S8"),
        )
        np.array([token for _, ids in samples for token in ids], np.uint32).tofile(
            folder / f"{name}.tokens.bin"
        )


def plain(
    variant: str, work: Workload, folder: Path, steps: int
) -> tuple[list[float], list[float]]:
    """A loop as one writes it without thinking of memory: padded, every logit of both models at
    once.
    """
    where, kind = distributed.device(), precision()
    student: Any = load_model(str(folder / "student"), dtype=kind).to(where).train()
    teacher: Any = None
    if variant == "full":
        teacher = (
            load_model(str(folder / "teacher"), dtype=kind).to(where).eval().requires_grad_(False)
        )
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.01)
    batch = sequences(work, 1)[0]
    width = max(len(ids) for _, ids in batch)
    ids = torch.full((len(batch), width), 2)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, tokens) in enumerate(batch):
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, :prompt] = -100
    ids, mask, labels = ids.to(where), mask.to(where), labels.to(where)
    step = _full_logits if variant == "full" else _sft
    seconds, losses = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = step(student, teacher, ids, mask, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if where.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds, losses


def _full_logits(
    student: Any, teacher: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    output = student(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    with torch.no_grad():
        target = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_q, log_p = functional.log_softmax(output.logits, -1), functional.log_softmax(target, -1)
    each = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[:, :-1]
    counts = labels[:, 1:] != -100
    kd: torch.Tensor = (each * counts).sum() / counts.sum()
    result: torch.Tensor = ALPHA * output.loss + (1 - ALPHA) * kd
    return result


def _sft(
    student: Any, teacher: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    loss: torch.Tensor = student(
        input_ids=ids, attention_mask=mask, labels=labels, use_cache=False
    ).loss
    return loss


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    name, workload, directory, count, result = sys.argv[1:]
    main(name, WORKLOADS[workload], Path(directory), int(count), Path(result))
