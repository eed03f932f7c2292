"""The workflow steps `train` and `baseline`, and `run_training`, which all trainings share: train
to the end of the plan and write the student as a Hugging Face folder.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from pocl_ds.compat.transformers_private import save_custom_code
from pocl_ds.config import (
    BaselineConfig,
    CurriculumConfig,
    LossConfig,
    PolicyConfig,
    PromptConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan_step import build_baseline_plan, load_order, load_plan
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.engines.protocol import Engine
from pocl_ds.errors import ArtifactError
from pocl_ds.generation.end_of_turn import recorded_end_ids, with_end_ids
from pocl_ds.models.load import load_tokenizer
from pocl_ds.models.lora import count_trainable_parameters, merge_adapters, save_adapter
from pocl_ds.runtime import distributed, sequence_parallel
from pocl_ds.runtime.job_roles import job_roles
from pocl_ds.teachers.cache_plan import CacheReference
from pocl_ds.training.build import build_trainer
from pocl_ds.training.invariance import check_models
from pocl_ds.training.local_inputs import local_inputs
from pocl_ds.training.trainer import Trainer
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.files import atomic_directory, remove_partial_directories, write_json
from pocl_ds.workflow.manifest import finished_manifest, read_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory, read_models

log = logging.getLogger("pocl_ds")


def train_student(
    run: RunDirectory,
    *,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    loss: LossConfig,
    policy: PolicyConfig,
    prompt: PromptConfig,
    train: TrainConfig,
    curriculum: CurriculumConfig,
    baseline: BaselineConfig | None,
    seed: int,
    fingerprint: str,
    teacher_cache: CacheReference | None = None,
    float32_weights: bool = False,
) -> None:
    """Train through the stages of the plan, or with `baseline` without a curriculum, rescoring,
    sample weights and token rule. All ranks call it.

    teacher_cache: the cached outputs of the teacher; None for an online one. float32_weights: write
    the optimizer's master weights to `final/`.
    """
    # SFT needs no teacher; with teacher.mode=auto the cache may be empty.
    models = read_models(run)
    if loss.name == "sft":
        teacher = None
    if teacher is None or uses_online_teacher(run, teacher, teacher_cache):
        teacher_cache = None
    # The stages of the plan, or one stage with as many optimizer steps.
    plan = load_plan(run.plan / "plan.json")
    if baseline:
        plan = build_baseline_plan(load_order(run), plan, baseline)
        loss = loss.model_copy(update={"token_rule": None})
        if distributed.rank() == 0:
            write_json(run.baseline / "plan.json", plan.to_json())
        # Its single stage is none of the curriculum's.
        teacher = teacher.single_stage if teacher else None
    teacher_paths = (models["teacher"], *models["other_teachers"]) if teacher else ()
    training = TrainingRun(
        directory=run.baseline if baseline else run.train,
        fingerprint=fingerprint,
        label="baseline" if baseline else "train",
        plan=plan,
        student_path=models["student"],
        student=student,
        teacher_paths=teacher_paths[: len(teacher.sources)] if teacher else (),
        teacher=teacher,
        loss=loss,
        train=train,
        seed=seed,
        policy=policy,
        rescoring=None if baseline else curriculum.rescoring,
        sample_weights=None if baseline else curriculum.sample_weights,
        max_length=prompt.max_length,
        end_of_turn_ids=tuple(recorded_end_ids(run)),
        teacher_responses=run.teacher_responses if policy.uses_teacher_responses else None,
        teacher_cache=teacher_cache,
        float32_weights=float32_weights,
    )
    run_training(run, training)


def uses_online_teacher(
    run: RunDirectory, teacher: TeacherConfig, teacher_cache: CacheReference | None
) -> bool:
    """Whether `pocl cache-teacher` decided, with teacher.mode=auto, to cache nothing.

    Raises ArtifactError if the recipe no longer has teacher.mode=auto.
    """
    manifest = read_manifest(run.teacher_cache)
    if not teacher_cache or not manifest or manifest.fingerprint != teacher_cache.fingerprint:
        return False
    if manifest.info["mode"] != "online":
        return False
    if teacher.mode != "auto":
        raise ArtifactError(
            f"teacher.mode={teacher.mode}, but {run.teacher_cache} was written with mode auto "
            f"and holds no teacher outputs: remove {run.teacher_cache}/manifest.json and run "
            f"`pocl cache-teacher`"
        )
    return True


def run_training(run: RunDirectory, training: TrainingRun) -> None:
    """Train one student to the end of its plan and write `final/`, a Hugging Face folder. Does
    nothing if the training is finished. All ranks call it.
    """
    if finished_manifest(training.directory, training.fingerprint):
        return
    stopwatch = distributed.Stopwatch()
    if training.train.engine == "deepspeed" or distributed.world_size() > 1:
        start_deepspeed()
    sequence_parallel.start(training.train.sequence_parallel_size)
    log.info(
        "%s: directory=%s engine=%s ranks=%d sequence_parallel_size=%d device=%s",
        training.label,
        training.directory,
        training.train.engine,
        distributed.world_size(),
        sequence_parallel.size(),
        distributed.device_name(),
    )
    with local_inputs(run, training) as (run, training):
        trainer = build_trainer(run, training)
        invariance = check_models(training, trainer.models, trainer.data)
        trainer.run()
        write_final_model(training, trainer.models.engine)
        if trainer.responses.rollout and trainer.responses.rollout.invariance:
            invariance["rollouts"] = trainer.responses.rollout.invariance
        _write_manifest(training, trainer, invariance, seconds=stopwatch.lap())
        distributed.barrier()


def write_final_model(training: TrainingRun, engine: Engine) -> None:
    """Write the trained weights, configuration and tokenizer to `final/`; all ranks take part in
    gathering the weights.
    """
    module: Any = engine.module
    model = module.model
    config = copy.deepcopy(model.config)
    if training.float32_weights:
        state = engine.gathered_master_state_dict(model)
        for section in (config, config.get_text_config(decoder=True)):
            section.dtype = torch.float32
    else:
        state = engine.gathered_state_dict(model)
    if training.student.lora:
        _write_adapter(training, model, state)
        state = dict(merge_adapters(model, state.items()))
    tokenizer = load_tokenizer(
        training.student_path, trust_remote_code=training.student.trust_remote_code
    )
    final = training.directory / "final"
    with (
        distributed.raise_on_all_ranks("write the trained weights"),
        contextlib.ExitStack() as stack,
    ):
        if distributed.rank() == 0:
            remove_partial_directories(final)
            folder = stack.enter_context(atomic_directory(final))
            save_torch_state_dict(state, folder, metadata={"format": "pt"})
            save_custom_code(model, folder)
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if model.can_generate() and model.generation_config is not None:
                settings = with_end_ids(model.generation_config, training.end_of_turn_ids)
                settings.save_pretrained(folder)


def _write_adapter(training: TrainingRun, model: Any, state: Mapping[str, Tensor]) -> None:
    """Write the adapters alone to `adapter/`, on rank 0."""
    folder = training.directory / "adapter"
    with distributed.raise_on_all_ranks("write the adapter"):
        if distributed.rank() == 0:
            remove_partial_directories(folder)
            # The recipe's name of the base model holds on other machines.
            is_own = training.student.prune or training.student.heal_steps
            base_model = training.student_path if is_own else training.student.model
            with atomic_directory(folder) as temporary:
                save_adapter(model, state, temporary, base_model=base_model)


def _write_manifest(
    training: TrainingRun, trainer: Trainer, invariance: dict[str, Any], *, seconds: float
) -> None:
    peak_memory = distributed.peak_memory()
    if distributed.rank() != 0:
        return
    plan, layout, roles = training.plan, trainer.data.layout, job_roles()
    info = {
        **peak_memory,
        "steps": plan.total_steps,
        "samples": plan.total_steps * plan.batch_size,
        "seconds": seconds,
        "trainable_parameters": count_trainable_parameters(trainer.models.engine.module)[0],
        "ranks": distributed.world_size(),
        "sequence_parallel_size": sequence_parallel.size(),
        "teacher_ranks": roles.teacher_ranks if roles else 0,
        "device": distributed.device_name(),
        "engine": training.train.engine,
        "dtype": training.student.dtype,
        "packed": layout.packed,
        "padding_share": round(layout.padding_share, 4),
        "resumed_at": trainer.first_step,
        "skipped_steps": trainer.non_finite.skipped,
        "batch_invariance": invariance,
    }
    written = [training.directory / name for name in ("final", "adapter")]
    files = [p for folder in written for p in sorted(folder.rglob("*")) if p.is_file()]
    write_manifest(training.directory, training.label, training.fingerprint, info=info, files=files)
