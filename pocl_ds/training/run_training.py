"""Trainings as stages: POCL itself, its plain-KD baseline, and the healing of a freshly pruned
student.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import save_torch_state_dict
from transformers.dynamic_module_utils import custom_object_save

from pocl_ds.config import (
    BaselineConfig,
    LossConfig,
    PolicyConfig,
    PromptConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from pocl_ds.config.registry import ACROSS_TOKENIZERS
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.plan_step import baseline_plan, load_plan
from pocl_ds.curriculum.sampler import permutation
from pocl_ds.data.tokenized import EncodedSplit
from pocl_ds.engines.engine import Engine, start_deepspeed
from pocl_ds.errors import ArtifactError, ModelError
from pocl_ds.models.attention import check_attention
from pocl_ds.models.heads import check_family
from pocl_ds.models.load import load_tokenizer, max_positions, pinned_model
from pocl_ds.models.lora import check_adapters, merged, trained_parameters
from pocl_ds.models.prune import parse_layers, prune_layers
from pocl_ds.models.quantization import check_student, check_teacher
from pocl_ds.models.quiet import quiet
from pocl_ds.runtime import distributed
from pocl_ds.training.build import Job, config_of, load, make_trainer
from pocl_ds.workflow.run_dir import (
    RunDirectory,
    atomic_directory,
    clear_remains,
    read_manifest,
    read_models,
    whole_result,
    within_models,
    write_json,
    write_manifest,
)

log = logging.getLogger("pocl_ds")

HEAL_TAU, HEAL_SFT_RATIO = 1.0, 0.3  # plain KD: what the baseline of the paper does


def train(
    run: RunDirectory,
    *,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    loss: LossConfig,
    policy: PolicyConfig,
    prompt: PromptConfig,
    train: TrainConfig,
    compare: BaselineConfig | None,
    seed: int,
    fingerprint: str,
    taught: str | None = None,
) -> None:
    """The stage `train`, or with `compare` its plain-KD baseline. All ranks call it."""
    models = read_models(run)
    teacher = None if loss.name == "sft" else teacher  # seqkd: it wrote its responses before
    plan = load_plan(run.plan / "plan.json")
    if compare:
        plan = baseline_plan(plan, compare)
        if distributed.rank() == 0:
            write_json(run.baseline / "plan.json", plan.to_json())
    job = Job(
        directory=run.baseline if compare else run.train,
        fingerprint=fingerprint,
        label="baseline" if compare else "train",
        plan=plan,
        order=np.load(run.ranking / "order.npy", mmap_mode="r"),
        student_path=models["student"],
        student=student,
        teacher_paths=(models["teacher"], *models["other_teachers"]) if teacher else (),
        teacher=teacher,
        loss=loss,
        train=train,
        seed=seed,
        taught=None if teacher is None or asks_live(run, teacher, taught) else taught,
        policy=policy,
        longest=prompt.max_length,
        responses=run.teacher_responses if policy.uses_teacher_responses else None,
    )
    fit(run, job)


def asks_live(run: RunDirectory, teacher: TeacherConfig, taught: str | None) -> bool:
    """Whether the stage `teach` found with teacher.mode=auto that nothing of the teacher is worth
    keeping.

    Raises ArtifactError where the recipe no longer leaves that choice.
    """
    manifest = read_manifest(run.teacher_cache)
    if manifest is None or manifest.fingerprint != taught or manifest.info["mode"] != "online":
        return False
    if teacher.mode != "auto":
        raise ArtifactError(
            f"teacher.mode={teacher.mode}, and {run.teacher_cache} says that with mode auto nothing was "
            f"kept: remove "
            f"{run.teacher_cache}/manifest.json and run `pocl cache-teacher`"
        )
    return True


def prepare(
    run: RunDirectory,
    *,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    train: TrainConfig,
    loss: LossConfig,
    seed: int,
    longest: int,
    fingerprint: str,
) -> None:
    """The stage `prepare`: the teacher's folder and the initial student, pruned and healed as the
    recipe says.

    longest: tokens of a prompt and its response; every model must be able to read them.
    """
    if whole_result(run.models, fingerprint):
        return
    watch = distributed.Stopwatch()
    if distributed.world_size() > 1:
        start_deepspeed()  # before anything that ranks wait for
    teachers = tuple(pinned_model(one) for one in (teacher, *teacher.ensemble)) if teacher else ()
    student_path, info = pinned_model(student), {}
    _check_models(teacher, teachers, student, student_path, loss, longest)
    if student.prune:
        pruned = run.models / "pruned"
        with distributed.together("prune the student"):
            if distributed.rank() == 0:
                info = _prune(student_path, pruned, student)
        student_path = str(pruned)
    if student.lora:  # before hours of scoring
        check_adapters(
            config_of(student_path, student),
            student.lora,
            trust_remote_code=student.trust_remote_code,
        )
    if student.heal_steps:
        split = EncodedSplit.open(run.data, "train")
        order = permutation(
            len(split), seed=seed, stage=0, epoch=0
        )  # a random part: the plan walks it once
        plan = single_stage_plan(
            order,
            steps=student.heal_steps,
            batch_size=train.batch_size,
            temperature=HEAL_TAU,
            sft_ratio=HEAL_SFT_RATIO,
        )
        healing = train.model_copy(update={"lr_restart": "never"})
        kd = LossConfig(name="fkl", chunk_memory_mb=loss.chunk_memory_mb, fused=loss.fused)
        kd = loss if loss.name in ACROSS_TOKENIZERS else kd
        fit(
            run,
            Job(
                run.models / "heal",
                fingerprint,
                "heal",
                plan,
                order,
                student_path,
                student,
                teachers,
                teacher,
                kd,
                healing,
                seed,
            ),
        )
        student_path = str(run.models / "heal" / "final")
        info |= {
            "heal_steps": student.heal_steps,
            "heal_samples": student.heal_steps * train.batch_size,
        }
    if distributed.rank() == 0:
        paths = {
            "teacher": teachers[0] if teachers else None,
            "other_teachers": teachers[1:],
            "student": within_models(run, student_path),
        }
        write_json(run.models / "models.json", paths)
        ours = Path(student_path).is_relative_to(run.models)
        made = (
            [path for path in sorted(Path(student_path).rglob("*")) if path.is_file()]
            if ours
            else []
        )
        write_manifest(
            run.models,
            "init-student",
            fingerprint,
            info={**info, "seconds": watch.lap()},
            files=[run.models / "models.json", *made],
        )
    distributed.barrier()


def _check_models(
    teacher: TeacherConfig | None,
    paths: Sequence[str],
    student: StudentConfig,
    student_path: str,
    loss: LossConfig,
    longest: int,
) -> None:
    """Refuse quantised weights where they cannot be, heads that cannot be split, attention that
    cannot be another's, and models that cannot read as far as samples may reach, before anything is
    loaded or scored.
    """
    config = config_of(student_path, student)
    check_student(student, config)
    readers: dict[str, Any] = {student_path: config}
    trained: list[tuple[str, Any]] = [(student.attn_implementation, config)]
    if teacher:
        for path, source in zip(paths, (teacher, *teacher.ensemble), strict=True):
            check_teacher(teacher, found := config_of(path, source))
            readers[path] = found
            trained += (
                [] if loss.name == "sft" else [(teacher.attn_implementation, found)]
            )  # else training does not ask it
    for path, one in readers.items():
        positions = max_positions(one)
        if positions is not None and longest > positions:
            raise ModelError(
                f"prompt.max_length={longest} is more than the {positions} positions of {path}: "
                f"lower it"
            )
    for attention, one in trained:
        check_attention(attention, one)
        if loss.fused:
            check_family(one.model_type)


def fit(run: RunDirectory, job: Job) -> None:
    """Train one student to the end of its plan and write `final/`, a Hugging Face folder."""
    if whole_result(job.directory, job.fingerprint):
        return
    watch = distributed.Stopwatch()
    if job.train.engine == "deepspeed" or distributed.world_size() > 1:
        start_deepspeed()
    log.info(
        "%s: %s, engine %s, on %d × %s",
        job.label,
        job.directory,
        job.train.engine,
        distributed.world_size(),
        distributed.device_name(),
    )
    trainer = make_trainer(run, job)
    trainer.run()
    _write_final(
        job,
        trainer.engine,
        load_tokenizer(job.student_path, trust_remote_code=job.student.trust_remote_code),
    )
    peak = distributed.peak_memory()
    if distributed.rank() == 0:
        info = {
            **peak,
            "steps": job.plan.total_steps,
            "samples": job.plan.total_steps * job.plan.batch_size,
            "seconds": watch.lap(),
            "trained_parameters": trained_parameters(trainer.engine.module)[0],
            "ranks": distributed.world_size(),
            "device": distributed.device_name(),
            "engine": job.train.engine,
            "packed": trainer.layout.packed,
            "padding_share": round(trainer.layout.padding_share, 4),
            "resumed_at": trainer.first_step,
            "skipped_steps": trainer.non_finite.skipped,
        }
        files = [p for p in sorted((job.directory / "final").rglob("*")) if p.is_file()]
        write_manifest(job.directory, job.label, job.fingerprint, info=info, files=files)
    distributed.barrier()


def _prune(source: str, target: Path, student: StudentConfig) -> dict[str, Any]:
    """Write the student without some layers, once."""
    assert student.prune is not None
    layers = parse_layers(student.prune.drop_layers)
    model = load(source, student, None)
    before = sum(p.numel() for p in model.parameters())
    model = prune_layers(model, layers)
    after = sum(p.numel() for p in model.parameters())
    log.info(
        "pruned %d layers: %.1f million parameters become %.1f million",
        len(layers),
        before / 1e6,
        after / 1e6,
    )
    clear_remains(target)
    with atomic_directory(target) as folder, quiet():
        model.save_pretrained(folder)
        load_tokenizer(source, trust_remote_code=student.trust_remote_code).save_pretrained(folder)
    return {"dropped_layers": layers, "parameters_before": before, "parameters_after": after}


def _write_final(job: Job, engine: Engine, tokenizer: Any) -> None:
    """The trained weights as a Hugging Face folder; every rank takes part in gathering."""
    module: Any = engine.module
    state = engine.state(module.model)
    if job.student.lora:
        state = merged(module.model, state)
    with distributed.together("write the trained weights"), contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            clear_remains(job.directory / "final")
            folder = stack.enter_context(atomic_directory(job.directory / "final"))
            save_torch_state_dict(state, folder, metadata={"format": "pt"})
            if getattr(
                module.model, "_auto_class", None
            ):  # its class is code that came with it, and must go with it
                custom_object_save(module.model, folder, config=module.model.config)
            module.model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if module.model.can_generate() and module.model.generation_config is not None:
                module.model.generation_config.save_pretrained(folder)
