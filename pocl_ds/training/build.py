"""What a training is made of: data, models and engines, from a `Job`. What can be refused is,
before a model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import (
    EnsembleTeacherConfig,
    LossConfig,
    ModelSource,
    PolicyConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    ds_config,
)
from pocl_ds.config.registry import ACROSS_TOKENIZERS
from pocl_ds.curriculum.plan import Plan
from pocl_ds.curriculum.sampler import Position, Sampler
from pocl_ds.data.generated import Written
from pocl_ds.data.preprocess import TEACHER
from pocl_ds.data.retokenize import Translator
from pocl_ds.data.tokenized import EncodedSplit
from pocl_ds.engines.engine import DeepSpeedEngine, Engine, TorchEngine, sharded_loading
from pocl_ds.errors import ModelError
from pocl_ds.generation.backends import check_backend
from pocl_ds.generation.subprocess_generator import INSTEAD
from pocl_ds.losses.fused_head import chunk_sizes
from pocl_ds.models.heads import packs
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer, max_positions
from pocl_ds.models.lora import add_adapters
from pocl_ds.models.quantization import bytes_per_weight
from pocl_ds.models.vocab import Ids, models_apart, reconcile_all
from pocl_ds.rollouts.policies import POLICIES
from pocl_ds.rollouts.rollout import Rollout
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache import TeacherStore
from pocl_ds.teachers.teacher import LiveTeacher, StoredTeacher, Teacher, Teachers
from pocl_ds.training.layout import choose_layout
from pocl_ds.training.memory_check import check_memory
from pocl_ds.training.student import Student
from pocl_ds.training.trainer import Trainer, TrainingData
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class Job:
    """One training: which student learns what from whom, and where that is written."""

    directory: Path
    fingerprint: str
    label: str
    plan: Plan
    order: NDArray[np.int64]
    student_path: str
    student: StudentConfig
    teacher_paths: tuple[str, ...]  # of the teacher and of teacher.ensemble
    teacher: TeacherConfig | None
    loss: LossConfig
    train: TrainConfig
    seed: int
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    longest: int = 512  # tokens of a prompt and the response that the student writes to it
    responses: Path | None = (
        # folder of an encoded split whose responses the teacher wrote, where the policy asks for it
        None
    )
    taught: str | None = None  # fingerprint of what was kept of the teacher; None asks the live one

    @property
    def teachers(self) -> list[ModelSource]:
        """The teacher and the others, each where it lies."""
        named = (self.teacher, *self.teacher.ensemble) if self.teacher else ()
        return [
            one.model_copy(update={"model": path})
            for one, path in zip(named, self.teacher_paths, strict=True)
        ]

    @property
    def across_tokenizers(self) -> bool:
        """Whether the teacher reads texts in its own tokens."""
        return self.loss.name in ACROSS_TOKENIZERS


def make_trainer(run: RunDirectory, job: Job) -> Trainer:
    """Models, engines and data of a training, ready to run."""
    seqkd = job.policy.name == "seqkd" and job.responses is not None
    splits = {
        "train": EncodedSplit.open(job.responses if seqkd and job.responses else run.data, "train"),
        "validation": EncodedSplit.open(run.data, "validation"),
    }
    taught = EncodedSplit.open(job.responses, "train") if job.responses and not seqkd else None
    validation = splits["validation"] if len(splits["validation"]) else None
    if job.policy.on_policy:
        check_backend(job.policy.rollout_backend, INSTEAD)
    engine, teacher, tokenizer, ids = _build(run, job, splits)
    module: Any = engine.module
    asked = (
        teacher.teachers
        if isinstance(teacher, Teachers)
        else [teacher]
        if isinstance(teacher, LiveTeacher)
        else []
    )
    translate = _translator(run, job, asked[0], tokenizer) if job.across_tokenizers else None
    if taught is not None:
        _check_tokens(taught, ids)
    data = TrainingData(
        splits["train"], job.order, validation, tokenizer.pad_token_id, translate, taught
    )
    models = [module.model, *(one.model for one in asked)]
    lengths = splits["train"].total_tokens[job.order]
    sampler = Sampler(job.plan, job.seed, lengths=lengths, window=job.train.length_window)
    layout = choose_layout(job.train, sampler, lengths, models)
    rollout = None
    if job.policy.on_policy:
        rollout = Rollout(
            job.policy,
            job.student,
            job.student_path,
            engine,
            splits["train"],
            ids,
            job.seed,
            job.longest,
        )
    policy = POLICIES[job.policy.name](job.policy, rollout.write if rollout else _never, job.seed)
    return Trainer(
        job.directory,
        plan=job.plan,
        sampler=sampler,
        data=data,
        engine=engine,
        teacher=teacher,
        loss=job.loss,
        train=job.train,
        seed=job.seed,
        fingerprint=job.fingerprint,
        label=job.label,
        layout=layout,
        policy=policy,
        rollout=rollout,
    )


def _translator(run: RunDirectory, job: Job, teacher: LiveTeacher, tokenizer: Any) -> Translator:
    """What gives batches to a teacher with another tokenizer."""
    assert job.teacher is not None
    theirs = load_tokenizer(
        job.teacher_paths[0],
        trust_remote_code=job.teacher.trust_remote_code,
        revision=job.teacher.revision,
    )
    prompts = {
        name: EncodedSplit.open(run.data / TEACHER, name) for name in ("train", "validation")
    }
    return Translator(
        tokenizer,
        theirs,
        prompts,
        longest=max_positions(teacher.model.config),
        packed=packs(teacher.model),
    )


def _never(rows: NDArray[np.int64], position: Position) -> Written:
    raise RuntimeError(f"this policy does not write, and was asked to at step {position.step}")


def _check_tokens(split: EncodedSplit, ids: Ids) -> None:
    """Raise ModelError where a response holds a token that takes no part in the softmax, as its
    loss would be infinite, or a prompt one that the teacher cannot read.
    """
    with distributed.together("check the tokens"):
        if distributed.rank() == 0:
            found = split.first_outside(ids.allowed, prompts=ids.readable)
            if found is not None:
                raise ModelError(
                    f"sample {split.ids[found[0]].decode()} holds token id {found[1]}, which "
                    f"teacher and student do not share: "
                    "choose a pair that shares its tokens, or leave the sample out"
                )


def _build(
    run: RunDirectory, job: Job, splits: dict[str, EncodedSplit]
) -> tuple[Engine, Teacher | None, Any, Ids]:
    """Engines around sharded models, the student's tokenizer, and the ids that take part.

    What can be refused is, before a model is loaded.
    """
    ranks, train = distributed.world_size(), job.train
    deepspeed = train.engine == "deepspeed"
    student_config = load_model_config(
        job.student_path, trust_remote_code=job.student.trust_remote_code
    )
    live = [] if job.taught else job.teachers
    longest = int(splits["train"].total_tokens.max(initial=1))
    logits = (
        8
        * int(student_config.vocab_size)
        * (train.micro_batch_tokens or train.micro_batch_size * longest)
    )
    frozen = None
    if job.teacher and live and deepspeed:
        frozen = ds_config.resolve_teacher(
            job.teacher.ds_config,
            dtype=job.teacher.dtype,
            ranks=ranks,
            micro_batch_size=train.micro_batch_size,
        )
    check_memory(
        job.student.model_copy(update={"model": job.student_path}),
        [(source, _quantised(source, job.teacher)) for source in live if job.teacher],
        teacher_bytes=4 if job.teacher and job.teacher.dtype == "float32" else 2,
        teacher_sharded=frozen is not None,
        chunk_bytes=min(job.loss.chunk_bytes, logits),
        sharded=deepspeed,
        copied=train.checkpoint.async_save,
        writer=job.policy.on_policy,
        held=job.policy.on_policy and job.policy.sync_weights_every > 1,
        lora=job.student.lora,
    )
    tokenizer = load_tokenizer(job.student_path, trust_remote_code=job.student.trust_remote_code)
    ids = Ids(int(student_config.vocab_size))
    teacher: Teacher | None = None
    if job.teacher:
        together = models_apart if job.across_tokenizers else reconcile_all
        sources = list(zip([job.teacher, *job.teacher.ensemble], job.teacher_paths, strict=True))
        vocabulary = together(sources, job.student, job.student_path)
        log.info("%s", vocabulary.report)
        ids = Ids.of(vocabulary)
        where = "sharded over the ranks" if frozen else "whole on every rank"
        log.info("the teacher is %s", "on disk, only its head is loaded" if job.taught else where)
    for split in splits.values():
        _check_tokens(split, ids)
    chunk_sizes(
        job.loss.name,
        ids.size,
        job.loss.chunk_bytes,
        torch.float32,
        distributed.device(),
        max(1, len(live)),
    )
    if job.teacher and job.taught:
        teacher = StoredTeacher(
            TeacherStore(run.teacher_cache, list(splits.values()), fingerprint=job.taught)
        )
    elif job.teacher:
        teacher = _live(job.teacher, job.teacher_paths, frozen, ids, split=job.loss.fused)
    sharded = ds_config.resolve_student(
        job.student.ds_config, train=train, dtype=job.student.dtype, ranks=ranks
    )
    with sharded_loading(sharded if deepspeed else None):
        model = load(job.student_path, job.student, job.student.dropout)
    if job.student.lora:
        log.info("%s", add_adapters(model, job.student.lora, job.seed))
    if job.student.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # DeepSpeed moves no buffers of a model that it shards: the mask would stay behind.
    module = Student(
        model, ids.to(distributed.device()), chunk_bytes=job.loss.chunk_bytes, split=job.loss.fused
    ).train()
    engine: Engine = (
        DeepSpeedEngine(module, train, sharded) if deepspeed else TorchEngine(module, train)
    )
    return engine, teacher, tokenizer, ids


def _live(
    config: TeacherConfig,
    paths: Sequence[str],
    frozen: dict[str, Any] | None,
    ids: Ids,
    *,
    split: bool,
) -> Teacher:
    """The live teacher, or the mixture of several."""
    sources: tuple[TeacherConfig | EnsembleTeacherConfig, ...] = (config, *config.ensemble)
    found = []
    for source, path in zip(sources, paths, strict=True):
        own = config.model_copy(
            update={"revision": source.revision, "trust_remote_code": source.trust_remote_code}
        )
        with sharded_loading(frozen):
            found.append(LiveTeacher(load(path, own, None), frozen, ids, split=split))
    if len(found) == 1:
        return found[0]
    mixture = Teachers(found, [source.weight for source in sources])
    log.info(
        "the student learns from a mixture: %s",
        ", ".join(
            f"{weight:.2f} of {path}" for weight, path in zip(mixture.weights, paths, strict=True)
        ),
    )
    return mixture


def load(path: str, config: StudentConfig | TeacherConfig, dropout: float | None) -> Any:
    return load_model(
        path,
        dtype=config.dtype,
        attention=config.attn_implementation,
        dropout=dropout,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        quantization=config.quantization if isinstance(config, TeacherConfig) else "none",
    )


def _quantised(source: ModelSource, teacher: TeacherConfig) -> float | None:
    """Bytes of a weight of a teacher's linear modules, where they are quantised."""
    return bytes_per_weight(config_of(source.model, source), teacher.quantization)


def config_of(path: str, model: ModelSource) -> Any:
    return load_model_config(
        path, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
