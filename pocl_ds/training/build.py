"""Build a `Trainer` from a `TrainingRun`: data, models and engines.

All checks that need no weights run before a model is loaded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import (
    EnsembleTeacherConfig,
    ModelSource,
    TeacherConfig,
    ds_config,
)
from pocl_ds.curriculum.plan_step import read_scores
from pocl_ds.curriculum.sampler import Sampler, SamplerPosition
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import DeepSpeedEngine, sharded_loading
from pocl_ds.engines.protocol import Engine
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.losses.fused_inputs import chunk_sizes
from pocl_ds.models.attention_choice import log_kernel
from pocl_ds.models.load import (
    embedding_rows,
    load_model_config,
    load_tokenizer,
)
from pocl_ds.models.lora import add_adapters
from pocl_ds.models.quantization import bytes_per_weight
from pocl_ds.models.recipe_model import ModelLoader, load_recipe_model, zero_sizes
from pocl_ds.models.token_checks import check_split, rows_by_reader
from pocl_ds.models.vocab import VocabMap, align_teacher_vocabularies, separate_vocabularies
from pocl_ds.rollouts.policies import POLICIES
from pocl_ds.rollouts.rollout import RolloutWorker
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache import TeacherCache
from pocl_ds.teachers.teacher import CachedTeacher, OnlineTeacher, Teacher, TeacherEnsemble
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.compilation import compile_layers
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout, choose_layout
from pocl_ds.training.memory_check import MemoryDemand, check_memory
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.responses import ResponseSource, check_rollout_backend
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.stage_ranking import StageRanking
from pocl_ds.training.student import Student
from pocl_ds.training.teacher_reader import build_teacher_reader
from pocl_ds.training.trainer import Trainer
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.training.utilization import measure_utilization
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

LOGIT_BYTES = 8  # one logit of teacher and student in float32


@dataclass(frozen=True)
class _Splits:
    train: TokenizedSplit
    validation: TokenizedSplit
    teacher_responses: TokenizedSplit | None  # the training samples with the teacher's responses

    @classmethod
    def open(cls, run: RunDirectory, training: TrainingRun) -> _Splits:
        validation = TokenizedSplit.open(run.data, "validation")
        responses = training.teacher_responses
        if responses is None:
            return cls(TokenizedSplit.open(run.data, "train"), validation, None)
        generated = TokenizedSplit.open(responses, "train")
        if training.policy.name == "seqkd":
            return cls(generated, validation, None)
        return cls(TokenizedSplit.open(run.data, "train"), validation, generated)


def build_trainer(
    run: RunDirectory, training: TrainingRun, load: ModelLoader = load_recipe_model
) -> Trainer:
    """Load models and data of a training. All ranks call it together.

    load: reads the weights of a model; `pocl bench` makes random ones in its place.

    Raises ResourceError if memory or a package is missing, ModelError for models that do not fit
    together, RecipeError for settings that these models do not support.
    """
    training = training.with_resolved_dtypes()
    splits = _Splits.open(run, training)
    if training.policy.on_policy:
        check_rollout_backend(training, splits.train)

    # Check memory, vocabularies and tokens before a model is loaded.
    teacher_ds_config = _teacher_ds_config(training)
    check_memory(_memory_demand(training, splits, teacher_is_sharded=bool(teacher_ds_config)))
    vocab = _align_vocabularies(training, teacher_is_sharded=bool(teacher_ds_config))
    _check_tokens(training, splits, vocab)
    _check_chunk_memory(training, vocab)

    # Load the teacher, then the student.
    teacher = _build_teacher(run, training, splits, vocab, teacher_ds_config, load)
    engine = _build_engine(training, vocab, load)
    student: Any = engine.module
    teacher_models = _online_models(teacher)

    # Choose the layout of micro-batches, and assemble the data and the schedule.
    lengths = np.asarray(splits.train.total_tokens, np.int64)
    sampler = Sampler(
        training.plan, training.seed, lengths=lengths, window=training.train.length_window
    )
    models = [student.model, *teacher_models]
    layout = choose_layout(training.train, sampler, lengths, models)
    for model in models if layout.packed else ():
        log_kernel(model, distributed.device())
    data = _training_data(training, splits, layout)
    data.teacher_reader = build_teacher_reader(run, training, teacher, teacher_models, vocab)
    rescoring = training.rescoring
    first_ranked_stage = rescoring.from_stage - 1 if rescoring else math.inf
    schedule = TrainingSchedule(training.plan, sampler, training.train, first_ranked_stage)
    training_models = TrainingModels(engine, teacher)
    monitor = TrainingMonitor(training.directory, training.label, training.train)
    stage_ranking = None
    if rescoring:
        stage_ranking = StageRanking(
            rescoring,
            training.sample_weights,
            read_scores(run, seed=training.seed),
            sampler,
            training_models,
            data,
            training.loss,
            monitor,
            fingerprint=training.fingerprint,
        )
    return Trainer(
        training_models,
        data,
        schedule,
        training.loss,
        _response_source(training, engine, splits.train, vocab),
        Checkpoints(
            training.directory / "checkpoints",
            training.train.checkpoint,
            fingerprint=training.fingerprint,
            dtype=training.student.dtype,
        ),
        monitor,
        measure_utilization(training),
        stage_ranking,
    )


def _training_data(training: TrainingRun, splits: _Splits, layout: Layout) -> TrainingData:
    return TrainingData(
        splits.train,
        splits.validation if len(splits.validation) else None,
        layout,
        training.train.micro_batch_size,
        training.train.micro_batch_tokens,
        teacher_responses=splits.teacher_responses,
    )


def _response_source(
    training: TrainingRun, engine: Engine, dataset: TokenizedSplit, vocab: VocabMap
) -> ResponseSource:
    """The policy, and the worker that generates the student's responses for it."""
    policy_class = POLICIES[training.policy.name]
    if not training.policy.on_policy:
        return ResponseSource(policy_class(training.policy, _cannot_generate, training.seed))
    worker = RolloutWorker(
        training.policy,
        training.student,
        training.student_path,
        engine,
        dataset,
        vocab,
        training.seed,
        training.max_length,
        training.end_of_turn_ids,
    )
    policy = policy_class(training.policy, worker.generate, training.seed)
    return ResponseSource(policy, worker)


def _cannot_generate(rows: NDArray[np.int64], position: SamplerPosition) -> GeneratedBatch:
    raise RuntimeError(
        f"an off-policy policy requested responses of the student at step {position.step}"
    )


def _check_tokens(training: TrainingRun, splits: _Splits, vocab: VocabMap) -> None:
    """Raise ModelError on all ranks for a token that the models cannot read or do not share."""
    teachers: list[tuple[ModelSource, str]] = []
    if training.teacher and not training.cross_tokenizer:
        sources = (training.teacher, *training.teacher.ensemble)
        teachers = list(zip(sources, training.teacher_paths, strict=True))
    with distributed.raise_on_all_ranks("check the tokens"):
        if distributed.rank() == 0:
            rows = rows_by_reader(vocab, (training.student, training.student_path), teachers)
            tokenizer = load_tokenizer(
                training.student_path, trust_remote_code=training.student.trust_remote_code
            )
            for split in filter(None, (splits.train, splits.validation, splits.teacher_responses)):
                check_split(split, vocab, tokenizer, rows)


def _check_chunk_memory(training: TrainingRun, vocab: VocabMap) -> None:
    """Raise RecipeError if loss.chunk_memory_mb does not hold the logits of one token."""
    teachers = max(1, len(training.online_teachers))
    chunk_bytes, device = training.loss.chunk_bytes, distributed.device()
    for divergence in (training.loss, *training.loss.by_writer.values()):
        chunk_sizes(divergence.name, vocab.size, chunk_bytes, torch.float32, device, teachers)


def _memory_demand(
    training: TrainingRun, splits: _Splits, *, teacher_is_sharded: bool
) -> MemoryDemand:
    """The memory that the training needs, for `check_memory`."""
    train, student, policy = training.train, training.student, training.policy
    longest = int(splits.train.total_tokens.max(initial=1))
    micro_batch_tokens = train.micro_batch_tokens or train.micro_batch_size * longest
    config = read_model_config(training.student_path, student)
    logit_bytes = LOGIT_BYTES * embedding_rows(config) * micro_batch_tokens
    teachers = [
        (source, _quantized_weight_bytes(source, training.teacher))
        for source in training.online_teachers
        if training.teacher
    ]
    return MemoryDemand(
        student.model_copy(update={"model": training.student_path}),
        teachers,
        teacher_dtype=training.teacher.dtype if training.teacher else "float32",
        teacher_sharded=teacher_is_sharded,
        student_sharded=train.engine == "deepspeed",
        chunk_bytes=min(training.loss.chunk_bytes, logit_bytes),
        async_save=train.checkpoint.async_save,
        rollout_worker=policy.on_policy,
        saved_rollout_weights=policy.on_policy and policy.sync_weights_every > 1,
        lora=student.lora,
    )


def _align_vocabularies(training: TrainingRun, *, teacher_is_sharded: bool) -> VocabMap:
    """Which ids take part in the softmax of both sides."""
    if training.teacher is None:
        config = read_model_config(training.student_path, training.student)
        return VocabMap(embedding_rows(config))
    align = separate_vocabularies if training.cross_tokenizer else align_teacher_vocabularies
    sources = [training.teacher, *training.teacher.ensemble]
    alignment = align(
        list(zip(sources, training.teacher_paths, strict=True)),
        training.student,
        training.student_path,
    )
    log.info("%s", alignment.report)
    if training.teacher_cache:
        log.info("the teacher's outputs are cached; only its head is loaded")
    else:
        placement = "sharded over the ranks" if teacher_is_sharded else "complete on every rank"
        log.info("the teacher is %s", placement)
    return VocabMap.from_alignment(alignment)


def _teacher_ds_config(training: TrainingRun) -> dict[str, Any] | None:
    """The DeepSpeed configuration of an online teacher; None if it is not sharded."""
    if training.teacher is None or training.teacher_cache or training.train.engine != "deepspeed":
        return None
    return ds_config.resolve_teacher(
        training.teacher.ds_config,
        dtype=training.teacher.dtype,
        ranks=distributed.world_size(),
        micro_batch_size=training.train.micro_batch_size,
        sizes=zero_sizes(training.teacher_paths[0], training.teacher),
    )


def _build_teacher(
    run: RunDirectory,
    training: TrainingRun,
    splits: _Splits,
    vocab: VocabMap,
    teacher_ds_config: dict[str, Any] | None,
    load: ModelLoader,
) -> Teacher | NoTeacher:
    """The cached teacher, the online teacher, the ensemble of several, or none."""
    config = training.teacher
    if config is None:
        return NoTeacher()
    if training.teacher_cache:
        cached = [splits.train, splits.validation]
        return CachedTeacher(
            TeacherCache(run.teacher_cache, cached, fingerprint=training.teacher_cache)
        )
    sources: tuple[TeacherConfig | EnsembleTeacherConfig, ...] = (config, *config.ensemble)
    teachers = []
    for source, path in zip(sources, training.teacher_paths, strict=True):
        source_config = config.model_copy(
            update={"revision": source.revision, "trust_remote_code": source.trust_remote_code}
        )
        with sharded_loading(teacher_ds_config):
            model = load(path, source_config, None)
            compile_layers(model, training.train)
            teachers.append(
                OnlineTeacher(model, teacher_ds_config, vocab, split=training.loss.fused)
            )
    if len(teachers) == 1:
        return teachers[0]
    ensemble = TeacherEnsemble(teachers, [source.weight for source in sources])
    members = zip(ensemble.weights, training.teacher_paths, strict=True)
    log.info("teacher ensemble: %s", ", ".join(f"{weight:.2f} {path}" for weight, path in members))
    return ensemble


def _online_models(teacher: Teacher | NoTeacher) -> list[Any]:
    """The models of online teachers."""
    teachers: Sequence[Any] = (
        teacher.teachers if isinstance(teacher, TeacherEnsemble) else [teacher]
    )
    return [member.model for member in teachers if isinstance(member, OnlineTeacher)]


def _build_engine(training: TrainingRun, vocab: VocabMap, load: ModelLoader) -> Engine:
    """The student in its engine, sharded from the start if DeepSpeed runs it."""
    student, train = training.student, training.train
    uses_deepspeed = train.engine == "deepspeed"
    config = ds_config.resolve_student(
        student.ds_config,
        train=train,
        dtype=student.dtype,
        ranks=distributed.world_size(),
        sizes=zero_sizes(training.student_path, student),
    )
    with sharded_loading(config if uses_deepspeed else None):
        model = load(training.student_path, student, student.dropout)
    if student.lora:
        log.info("%s", add_adapters(model, student.lora, training.seed))
    if student.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_layers(model, train)
    module = Student(
        model,
        vocab.to(distributed.device()),  # DeepSpeed moves no buffers of a model that it shards
        chunk_bytes=training.loss.chunk_bytes,
        split=training.loss.fused,
    ).train()
    return DeepSpeedEngine(module, train, config) if uses_deepspeed else TorchEngine(module, train)


def read_model_config(path: str, source: ModelSource) -> Any:
    """The configuration of the model in a folder."""
    return load_model_config(
        path, trust_remote_code=source.trust_remote_code, revision=source.revision
    )


def _quantized_weight_bytes(source: ModelSource, teacher: TeacherConfig) -> float | None:
    """Bytes per weight of a teacher's linear layers, None if they are not quantized."""
    return bytes_per_weight(read_model_config(source.model, source), teacher.quantization)
