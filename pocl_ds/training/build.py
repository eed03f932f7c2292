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

from pocl_ds.config import ModelSource, ds_config
from pocl_ds.config.curriculum_checks import rescoring_runs_teacher
from pocl_ds.curriculum.plan_step import read_scores
from pocl_ds.curriculum.sampler import Sampler, SamplerPosition
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.data.split_sources import read_split_domains
from pocl_ds.data.thought_spans import ThoughtFinder
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import DeepSpeedEngine, sharded_loading
from pocl_ds.engines.protocol import Engine
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.losses.fused_inputs import chunk_sizes
from pocl_ds.models.attention_choice import log_kernel
from pocl_ds.models.load import embedding_rows, load_tokenizer
from pocl_ds.models.lora import add_adapters
from pocl_ds.models.recipe_model import (
    ModelLoader,
    load_recipe_model,
    read_model_config,
    zero_sizes,
)
from pocl_ds.models.sequence_shards import check_heads
from pocl_ds.models.token_checks import check_split, rows_by_reader
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts.policies import POLICIES
from pocl_ds.rollouts.rollout import RolloutWorker
from pocl_ds.runtime import distributed
from pocl_ds.teachers.routed import DomainTeachers, StageTeachers
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.compilation import prepare_layers
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout, choose_layout
from pocl_ds.training.memory_check import MemoryDemand, check_memory
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.remote_loading import teacher_client
from pocl_ds.training.request_ahead import TeacherRequests
from pocl_ds.training.responses import ResponseSource, check_rollout_backend
from pocl_ds.training.sample_flops import SampleFlops, flops_of_training
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.stage_ranking import StageRanking
from pocl_ds.training.student import Student
from pocl_ds.training.teacher_reader import build_teacher_reader
from pocl_ds.training.teachers_of_run import (
    align_vocabularies,
    build_teacher,
    loaded_models,
    models_for_layout,
    quantized_teachers,
    teacher_is_sharded,
)
from pocl_ds.training.thought_weights import ThoughtWeights
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

    # Load the teacher, then the student. A teacher with its own ranks loads at the same time.
    vocab = _check_before_loading(training, splits)
    cached_splits = [splits.train, splits.validation]
    teacher = build_teacher(run, training, cached_splits, vocab, load)
    engine = _build_engine(training, vocab, load)
    models = TrainingModels(engine, teacher)
    models.wait_for_teachers()

    # Order the samples, choose the layout of micro-batches, and assemble the data.
    lengths = np.asarray(splits.train.total_tokens, np.int64)
    sampler = Sampler(
        training.plan, training.seed, lengths=lengths, window=training.train.length_window
    )
    student: Any = engine.module
    teacher_models = models_for_layout(training, teacher)
    layout = choose_layout(training.train, sampler, lengths, [student.model, *teacher_models])
    if layout.packed:
        _log_kernels([student.model, *loaded_models(teacher)])
        if isinstance(teacher, StageTeachers):
            teacher.on_load.append(lambda loaded, _: _log_kernels(loaded_models(loaded)))
    flops = flops_of_training(training)
    data = _training_data(run, training, splits, layout, flops, models)
    data.teacher_reader = build_teacher_reader(run, training, teacher, teacher_models, vocab)

    monitor = TrainingMonitor(training.directory, training.label, training.train)
    return Trainer(
        models,
        data,
        _training_schedule(training, sampler, teacher),
        training.loss,
        _response_source(training, engine, splits.train, vocab),
        Checkpoints(
            training.directory / "checkpoints",
            training.train.checkpoint,
            fingerprint=training.fingerprint,
            dtype=training.student.dtype,
        ),
        monitor,
        measure_utilization(training, flops),
        _stage_ranking(run, training, sampler, models, data, monitor),
    )


def _check_before_loading(training: TrainingRun, splits: _Splits) -> VocabMap:
    """Check memory, vocabularies and tokens before a model is loaded."""
    check_memory(_memory_demand(training, splits))
    vocab = align_vocabularies(training)
    _check_tokens(training, splits, vocab)
    _check_chunk_memory(training, vocab)
    student = training.student.model_copy(update={"model": training.student_path})
    for source in (student, *training.online_teachers):
        config = read_model_config(source.model, source)
        check_heads(config, training.train.sequence_parallel_size)
    return vocab


def _training_schedule(training: TrainingRun, sampler: Sampler, teacher: Any) -> TrainingSchedule:
    rescoring = training.rescoring
    # Batches with cached outputs, or outputs that are requested early, are made while the teacher
    # of their stage is open.
    made_early = bool(training.teacher_cache or _has_own_ranks(training))
    return TrainingSchedule(
        training.plan,
        sampler,
        training.train,
        rescoring.from_stage - 1 if rescoring else math.inf,
        prepares_next_stage=not (isinstance(teacher, StageTeachers) and made_early),
    )


def _stage_ranking(
    run: RunDirectory,
    training: TrainingRun,
    sampler: Sampler,
    models: TrainingModels,
    data: TrainingData,
    monitor: TrainingMonitor,
) -> StageRanking | None:
    """What ranks the samples again when a stage begins."""
    rescoring, weights = training.rescoring, training.sample_weights
    if not rescoring:
        return None
    return StageRanking(
        rescoring,
        weights,
        read_scores(run, seed=training.seed),
        sampler,
        models,
        data,
        training.loss,
        monitor,
        runs_teacher=rescoring_runs_teacher(rescoring, weights, training.loss, training.teacher),
        fingerprint=training.fingerprint,
    )


def _has_own_ranks(training: TrainingRun) -> bool:
    return bool(training.teacher and training.teacher.placement == "own_ranks")


def _log_kernels(models: Sequence[Any]) -> None:
    for model in models:
        log_kernel(model, distributed.device())


def _training_data(
    run: RunDirectory,
    training: TrainingRun,
    splits: _Splits,
    layout: Layout,
    flops: SampleFlops | None,
    models: TrainingModels,
) -> TrainingData:
    data = TrainingData(
        splits.train,
        splits.validation if len(splits.validation) else None,
        layout,
        training.train.micro_batch_size,
        training.train.micro_batch_tokens,
        teacher_responses=splits.teacher_responses,
        sample_flops=flops,
    )
    data.validation_domains = read_split_domains(run.data, "validation")
    data.thought_weights = _thought_weights(training)
    if isinstance(models.teacher, DomainTeachers):
        data.teacher_of_row = models.teacher.model_of_row
    if _has_own_ranks(training):
        ahead = teacher_client().schedule.requests_ahead
        data.teacher_requests = TeacherRequests(models.remote_teacher_of, ahead)
    return data


def _thought_weights(training: TrainingRun) -> ThoughtWeights | None:
    if training.loss.thought_weight == 1:
        return None
    trust = training.student.trust_remote_code
    tokenizer = load_tokenizer(training.student_path, trust_remote_code=trust)
    return ThoughtWeights(ThoughtFinder(tokenizer), training.loss.thought_weight)


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
        teachers = list(zip(training.teacher.sources, training.teacher_paths, strict=True))
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
    teachers = training.teachers_of_a_token
    chunk_bytes, device = training.loss.chunk_bytes, distributed.device()
    for divergence in (training.loss, *training.loss.by_writer.values()):
        chunk_sizes(divergence.name, vocab.size, chunk_bytes, torch.float32, device, teachers)


def _memory_demand(training: TrainingRun, splits: _Splits) -> MemoryDemand:
    """The memory that the training needs, for `check_memory`."""
    train, student, policy = training.train, training.student, training.policy
    longest = int(splits.train.total_tokens.max(initial=1))
    micro_batch_tokens = train.micro_batch_tokens or train.micro_batch_size * longest
    rank_tokens = -(-micro_batch_tokens // train.sequence_parallel_size)
    config = read_model_config(training.student_path, student)
    logit_bytes = LOGIT_BYTES * embedding_rows(config) * rank_tokens
    return MemoryDemand(
        student.model_copy(update={"model": training.student_path}),
        quantized_teachers(training),
        teacher_dtype=training.teacher.dtype if training.teacher else "float32",
        teacher_sharded=teacher_is_sharded(training),
        one_teacher_at_a_time=bool(training.teacher and training.teacher.by_stage),
        student_sharded=train.engine == "deepspeed",
        chunk_bytes=min(training.loss.chunk_bytes, logit_bytes),
        async_save=train.checkpoint.async_save,
        rollout_worker=policy.on_policy,
        saved_rollout_weights=policy.on_policy and policy.sync_weights_every > 1,
        lora=student.lora,
    )


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
    prepare_layers(model, train)
    module = Student(
        model,
        vocab.to(distributed.device()),  # DeepSpeed moves no buffers of a model that it shards
        chunk_bytes=training.loss.chunk_bytes,
        split=training.loss.fused,
        offload=student.activation_offloading,
    ).train()
    return DeepSpeedEngine(module, train, config) if uses_deepspeed else TorchEngine(module, train)
