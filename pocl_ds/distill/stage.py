"""Trainings as stages: POCL itself, its plain-KD baseline, and the healing of a freshly pruned student."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from numpy.typing import NDArray

from pocl_ds import distributed, ds_config
from pocl_ds.artifacts import RunDirectory, atomic_directory, read_json, read_manifest, write_json, write_manifest
from pocl_ds.config import (
    ACROSS_TOKENIZERS,
    CompareConfig,
    LossConfig,
    OtherTeacherConfig,
    PolicyConfig,
    PromptConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import Plan, single_stage_plan
from pocl_ds.curriculum.sampler import Position, Sampler, permutation
from pocl_ds.curriculum.stage import baseline_plan, load_plan
from pocl_ds.data.encode import EncodedSplit
from pocl_ds.data.stage import TEACHER
from pocl_ds.data.translate import Translator
from pocl_ds.data.written import Written
from pocl_ds.distill.engine import DeepSpeedEngine, Engine, TorchEngine, sharded_loading, start_deepspeed
from pocl_ds.distill.fused_head import chunk_sizes
from pocl_ds.distill.layout import choose_layout
from pocl_ds.distill.memory import check_memory
from pocl_ds.distill.policies import POLICIES
from pocl_ds.distill.rollout import Rollout
from pocl_ds.distill.student import Student
from pocl_ds.distill.teacher import LiveTeacher, StoredTeacher, Teacher, Teachers
from pocl_ds.distill.teacher_store import TeacherStore
from pocl_ds.distill.trainer import Trainer, TrainingData
from pocl_ds.errors import ArtifactError, ModelError, RecipeError
from pocl_ds.models.heads import packs
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer, max_positions, resolve_model
from pocl_ds.models.lora import add_adapters, check_adapters, merged, trained_parameters
from pocl_ds.models.prune import parse_layers, prune_layers
from pocl_ds.models.quantization import bytes_per_weight, check_student, check_teacher
from pocl_ds.models.quiet import quiet
from pocl_ds.models.vocabulary import Ids, models_apart, reconcile_all

log = logging.getLogger("pocl_ds")

HEAL_TAU, HEAL_SFT_RATIO = 1.0, 0.3  # plain KD: what the baseline of the paper does


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
    teacher_paths: tuple[str, ...]  # of the teacher and of teacher.others
    teacher: TeacherConfig | None
    loss: LossConfig
    train: TrainConfig
    seed: int
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    longest: int = 512  # tokens of a prompt and the response that the student writes to it
    responses: Path | None = None  # folder of an encoded split whose responses the teacher wrote; None: the data's own
    taught: str | None = None  # fingerprint of what was kept of the teacher; None asks the live one

    @property
    def across_tokenizers(self) -> bool:
        """Whether the teacher reads texts in its own tokens."""
        return self.loss.name in ACROSS_TOKENIZERS


def train(
    run: RunDirectory,
    *,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    loss: LossConfig,
    policy: PolicyConfig,
    prompt: PromptConfig,
    train: TrainConfig,
    compare: CompareConfig | None,
    seed: int,
    fingerprint: str,
    taught: str | None = None,
) -> None:
    """The stage `train`, or with `compare` its plain-KD baseline. All ranks call it."""
    models = read_json(run.models / "models.json")
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
        responses=run.responses if policy.name == "seqkd" else None,
    )
    fit(run, job)


def asks_live(run: RunDirectory, teacher: TeacherConfig, taught: str | None) -> bool:
    """Whether the stage `teach` found with teacher.mode=auto that nothing of the teacher is worth keeping.

    Raises ArtifactError where the recipe no longer leaves that choice.
    """
    manifest = read_manifest(run.teacher)
    if manifest is None or manifest.fingerprint != taught or manifest.info["mode"] != "live":
        return False
    if teacher.mode != "auto":
        raise ArtifactError(f"teacher.mode={teacher.mode}, and {run.teacher} says that with mode auto nothing was kept: remove "
                            f"{run.teacher}/manifest.json and run `pocl teach`")  # fmt: skip
    return True


def prepare(
    run: RunDirectory,
    *,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    train: TrainConfig,
    loss: LossConfig,
    seed: int,
    fingerprint: str,
) -> None:
    """The stage `prepare`: the teacher's folder and the initial student, pruned and healed as the recipe says."""
    manifest = read_manifest(run.models)
    if manifest and manifest.fingerprint == fingerprint:
        return
    watch = distributed.Stopwatch()
    teachers = tuple(resolve_model(one) for one in (teacher, *teacher.others)) if teacher else ()
    student_path, info = resolve_model(student), {}
    _check_quantised(teacher, teachers, student, student_path)
    if student.prune:
        pruned = run.models / "pruned"
        if distributed.rank() == 0:
            info = _prune(student_path, pruned, student)
        distributed.barrier()
        student_path = str(pruned)
    if student.lora:  # before hours of scoring
        check_adapters(load_model_config(student_path, trust_remote_code=student.trust_remote_code), student.lora)
    if student.heal_steps:
        start_deepspeed()
        split = EncodedSplit.open(run.data, "train")
        order = permutation(len(split), seed=seed, stage=0, epoch=0)  # a random part: the plan walks it once
        plan = single_stage_plan(
            order, steps=student.heal_steps, batch_size=train.batch_size, tau=HEAL_TAU, alpha=HEAL_SFT_RATIO
        )
        healing = train.model_copy(update={"schedule": "whole_run"})
        kd = loss if loss.name in ACROSS_TOKENIZERS else LossConfig(name="fkl", chunk_bytes=loss.chunk_bytes)
        fit(run, Job(run.models / "heal", fingerprint, "heal", plan, order, student_path, student, teachers, teacher, kd,
                     healing, seed))
        student_path = str(run.models / "heal" / "final")
        info |= {"heal_steps": student.heal_steps, "heal_samples": student.heal_steps * train.batch_size}
    if distributed.rank() == 0:
        paths = {"teacher": teachers[0] if teachers else None, "other_teachers": teachers[1:], "student": student_path}
        write_json(run.models / "models.json", paths)
        write_manifest(run.models, "prepare", fingerprint, info={**info, "seconds": watch.lap()},
                       files=[run.models / "models.json"])
    distributed.barrier()


def _check_quantised(teacher: TeacherConfig | None, paths: Sequence[str], student: StudentConfig, student_path: str) -> None:
    """Refuse quantised weights where they cannot be, before anything is loaded."""
    if teacher:
        for path in paths:
            check_teacher(teacher, _config(path, teacher))
    check_student(student, _config(student_path, student))


def _quantised(path: str, teacher: TeacherConfig) -> float | None:
    """Bytes of a weight of a teacher's linear modules, where they are quantised."""
    return bytes_per_weight(_config(path, teacher), teacher.quantization)


def _config(path: str, model: StudentConfig | TeacherConfig) -> Any:
    return load_model_config(path, trust_remote_code=model.trust_remote_code, revision=model.revision)


def fit(run: RunDirectory, job: Job) -> None:
    """Train one student to the end of its plan and write `final/`, a Hugging Face folder."""
    manifest = read_manifest(job.directory)
    if manifest and manifest.fingerprint == job.fingerprint:
        return
    watch = distributed.Stopwatch()
    if job.train.engine == "deepspeed" or distributed.world_size() > 1:
        start_deepspeed()
    trainer = make_trainer(run, job)
    trainer.run()
    _write_final(job, trainer.engine, load_tokenizer(job.student_path, trust_remote_code=job.student.trust_remote_code))
    if distributed.rank() == 0:
        info = {
            "steps": job.plan.total_steps, "samples": job.plan.total_steps * job.plan.batch_size, "seconds": watch.lap(),
            "trained_parameters": trained_parameters(trainer.engine.module)[0],
            "ranks": distributed.world_size(), "engine": job.train.engine, "packed": trainer.layout.packed,
            "padding_share": round(trainer.layout.padding_share, 4),
            "resumed_at": trainer.first_step, "skipped_steps": trainer.non_finite.skipped,
        }
        files = [p for p in sorted((job.directory / "final").rglob("*")) if p.is_file()]
        write_manifest(job.directory, job.label, job.fingerprint, info=info, files=files)
    distributed.barrier()


def make_trainer(run: RunDirectory, job: Job) -> Trainer:
    """Models, engines and data of a training, ready to run."""
    folders = {"train": job.responses or run.data, "validation": run.data}
    splits = {name: EncodedSplit.open(folder, name) for name, folder in folders.items()}
    validation = splits["validation"] if len(splits["validation"]) else None
    if job.policy.name == "distillm" and job.policy.buffer > len(splits["train"]):
        count = len(splits["train"])
        raise RecipeError(f"policy.buffer={job.policy.buffer} is more than the {count} training samples: make it smaller")
    engine, teacher, tokenizer, ids = _build(run, job, splits)
    module: Any = engine.module
    asked = teacher.teachers if isinstance(teacher, Teachers) else [teacher] if isinstance(teacher, LiveTeacher) else []
    translate = _translator(run, job, asked[0], tokenizer) if job.across_tokenizers else None
    data = TrainingData(splits["train"], job.order, validation, tokenizer.pad_token_id, translate)
    models = [module.model, *(one.model for one in asked)]
    lengths = splits["train"].total_tokens[job.order]
    sampler = Sampler(job.plan, job.seed, lengths=lengths, window=job.train.length_window)
    layout = choose_layout(job.train, sampler, lengths, models)
    rollout = None
    if job.policy.on_policy:
        rollout = Rollout(job.policy, job.student, job.student_path, engine, splits["train"], ids, job.seed, job.longest)
    policy = POLICIES[job.policy.name](job.policy, rollout.write if rollout else _never, job.seed)
    return Trainer(
        job.directory, plan=job.plan, sampler=sampler, data=data, engine=engine, teacher=teacher, loss=job.loss, train=job.train,
        seed=job.seed, fingerprint=job.fingerprint, label=job.label, layout=layout, policy=policy, rollout=rollout,
    )


def _translator(run: RunDirectory, job: Job, teacher: LiveTeacher, tokenizer: Any) -> Translator:
    """What gives batches to a teacher with another tokenizer."""
    assert job.teacher is not None
    theirs = load_tokenizer(job.teacher_paths[0], trust_remote_code=job.teacher.trust_remote_code, revision=job.teacher.revision)
    prompts = {name: EncodedSplit.open(run.data / TEACHER, name) for name in ("train", "validation")}
    return Translator(tokenizer, theirs, prompts, longest=max_positions(teacher.model.config), packed=packs(teacher.model))


def _never(rows: NDArray[np.int64], position: Position) -> Written:
    raise RuntimeError(f"this policy does not write, and was asked to at step {position.step}")


def _check_tokens(split: EncodedSplit, ids: Ids) -> None:
    """Raise ModelError where a response holds a token that takes no part in the softmax: its loss would be infinite.

    Where ids are mapped, prompts count too: the teacher has to read them.
    """
    with distributed.together("check the tokens"):
        if distributed.rank() == 0:
            found = split.first_outside(ids.allowed, prompts=ids.teacher_ids is not None)
            if found is not None:
                raise ModelError(
                    f"sample {split.ids[found[0]].decode()} holds token id {found[1]}, which teacher and student do not share: "
                    "choose a pair that shares its tokens, or leave the sample out"
                )


def _build(run: RunDirectory, job: Job, splits: dict[str, EncodedSplit]) -> tuple[Engine, Teacher | None, Any, Ids]:
    """Engines around sharded models, the student's tokenizer, and the ids that take part.

    What can be refused is, before a model is loaded.
    """
    ranks, train = distributed.world_size(), job.train
    deepspeed = train.engine == "deepspeed"
    student_config = load_model_config(job.student_path, trust_remote_code=job.student.trust_remote_code)
    live = () if job.taught else job.teacher_paths
    longest = int(splits["train"].total_tokens.max(initial=1))
    logits = 8 * int(student_config.vocab_size) * (train.micro_batch_tokens or train.micro_batch_size * longest)
    frozen = None
    if job.teacher and live and deepspeed:
        frozen = ds_config.resolve_teacher(
            job.teacher.ds_config, dtype=job.teacher.dtype, ranks=ranks, micro_batch_size=train.micro_batch_size
        )
    check_memory(
        job.student_path, [(path, _quantised(path, job.teacher)) for path in live if job.teacher],
        teacher_bytes=4 if job.teacher and job.teacher.dtype == "float32" else 2,
        teacher_sharded=frozen is not None, chunk_bytes=min(job.loss.chunk_bytes, logits), sharded=deepspeed,
        copied=train.checkpoint.in_background, writer=job.policy.on_policy, lora=job.student.lora,
    )
    tokenizer = load_tokenizer(job.student_path, trust_remote_code=job.student.trust_remote_code)
    ids = Ids(int(student_config.vocab_size))
    teacher: Teacher | None = None
    if job.teacher:
        together = models_apart if job.across_tokenizers else reconcile_all
        sources = list(zip([job.teacher, *job.teacher.others], job.teacher_paths, strict=True))
        vocabulary = together(sources, job.student, job.student_path)
        log.info("%s", vocabulary.report)
        ids = Ids.of(vocabulary)
        where = "sharded over the ranks" if frozen else "whole on every rank"
        log.info("the teacher is %s", "on disk, only its head is loaded" if job.taught else where)
    _check_tokens(splits["train"], ids)
    chunk_sizes(job.loss.name, ids.size, job.loss.chunk_bytes, torch.float32, distributed.device(), max(1, len(live)))
    if job.teacher and job.taught:
        teacher = StoredTeacher(TeacherStore(run.teacher, list(splits.values()), fingerprint=job.taught))
    elif job.teacher:
        teacher = _live(job.teacher, job.teacher_paths, frozen, ids)
    sharded = ds_config.resolve_student(job.student.ds_config, train=train, dtype=job.student.dtype, ranks=ranks)
    with sharded_loading(sharded if deepspeed else None):
        model = _load(job.student_path, job.student, job.student.dropout)
    if job.student.lora:
        log.info("%s", add_adapters(model, job.student.lora, job.seed))
    if job.student.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Student(model, ids, chunk_bytes=job.loss.chunk_bytes).train()
    engine: Engine = DeepSpeedEngine(module, train, sharded) if deepspeed else TorchEngine(module, train)
    return engine, teacher, tokenizer, ids


def _live(config: TeacherConfig, paths: Sequence[str], frozen: dict[str, Any] | None, ids: Ids) -> Teacher:
    """The live teacher, or the mixture of several."""
    sources: tuple[TeacherConfig | OtherTeacherConfig, ...] = (config, *config.others)
    found = []
    for source, path in zip(sources, paths, strict=True):
        own = config.model_copy(update={"revision": source.revision, "trust_remote_code": source.trust_remote_code})
        with sharded_loading(frozen):
            found.append(LiveTeacher(_load(path, own, None), frozen, ids))
    if len(found) == 1:
        return found[0]
    mixture = Teachers(found, [source.weight for source in sources])
    log.info("the student learns from a mixture: %s", ", ".join(
        f"{weight:.2f} of {path}" for weight, path in zip(mixture.weights, paths, strict=True)))  # fmt: skip
    return mixture


def _load(path: str, config: StudentConfig | TeacherConfig, dropout: float | None) -> Any:
    return load_model(
        path, dtype=config.dtype, attention=config.attention, dropout=dropout,
        trust_remote_code=config.trust_remote_code, revision=config.revision,
        quantization=config.quantization if isinstance(config, TeacherConfig) else "none",
    )


def _prune(source: str, target: Path, student: StudentConfig) -> dict[str, Any]:
    """Write the student without some layers, once."""
    assert student.prune is not None
    layers = parse_layers(student.prune.drop_layers)
    model = _load(source, student, None)
    before = sum(p.numel() for p in model.parameters())
    model = prune_layers(model, layers)
    after = sum(p.numel() for p in model.parameters())
    log.info("pruned %d layers: %.1f million parameters become %.1f million", len(layers), before / 1e6, after / 1e6)
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
            folder = stack.enter_context(atomic_directory(job.directory / "final"))
            save_torch_state_dict(state, folder, metadata={"format": "pt"})
            module.model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if module.model.can_generate() and module.model.generation_config is not None:
                module.model.generation_config.save_pretrained(folder)
