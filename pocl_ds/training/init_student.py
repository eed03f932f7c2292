"""The workflow step `init-student`: download the models, then prune and heal the student if the
recipe asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import LossConfig, ModelConfig, StudentConfig, TeacherConfig, TrainConfig
from pocl_ds.config.registry import CROSS_TOKENIZER_LOSSES
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import permutation
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.models.attention import check_attention
from pocl_ds.models.cost import decoder_layers
from pocl_ds.models.heads import check_family
from pocl_ds.models.load import empty_model, load_tokenizer, resolve_pinned_model
from pocl_ds.models.lora import check_adapters
from pocl_ds.models.mlp_tiles import dense_mlps
from pocl_ds.models.prune import parse_layers, prune_layers
from pocl_ds.models.quantization import check_quantized_teacher, check_student_is_not_quantized
from pocl_ds.models.quiet import quiet
from pocl_ds.models.recipe_model import load_recipe_model, read_model_config
from pocl_ds.runtime import distributed
from pocl_ds.training.run_training import run_training
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.files import atomic_directory, remove_partial_directories, write_json
from pocl_ds.workflow.manifest import finished_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory, movable_model_path

log = logging.getLogger("pocl_ds")

# Healing is plain distillation with the settings of the paper's baseline.
HEAL_TEMPERATURE, HEAL_SFT_RATIO = 1.0, 0.3


def init_student(
    run: RunDirectory,
    *,
    student: StudentConfig,
    teacher: TeacherConfig | None,
    train: TrainConfig,
    loss: LossConfig,
    seed: int,
    fingerprint: str,
) -> None:
    """Download the models, check that they can be trained together, prune and heal the student. All
    ranks call it.

    Raises ModelError for models that cannot be used.
    """
    if finished_manifest(run.models, fingerprint):
        return
    stopwatch = distributed.Stopwatch()
    if distributed.world_size() > 1:
        start_deepspeed()  # before the first collective

    # Download the models, and check that they can be trained before hours of scoring.
    sources = teacher.sources if teacher else ()
    teacher_paths = tuple(resolve_pinned_model(source) for source in sources)
    student_path = resolve_pinned_model(student)
    _check_models(teacher, teacher_paths, student, student_path, loss, train)
    info: dict[str, Any] = {}
    if student.prune:
        pruned = run.models / "pruned"
        with distributed.raise_on_all_ranks("prune the student"):
            if distributed.rank() == 0:
                info = _prune(student_path, pruned, student)
        student_path = str(pruned)
    if student.lora:
        config = read_model_config(student_path, student)
        empty = empty_model(config, trust_remote_code=student.trust_remote_code)
        check_adapters(empty, student.lora)
    # A pruned student recovers in a few steps of plain distillation.
    if student.heal_steps:
        _heal(run, student, student_path, teacher, teacher_paths, loss, train, seed, fingerprint)
        student_path = str(run.models / "heal" / "final")
        info["heal_steps"] = student.heal_steps
        info["heal_samples"] = student.heal_steps * train.batch_size

    # Record where the models are.
    if distributed.rank() == 0:
        info["seconds"] = stopwatch.lap()
        _write_result(run, teacher_paths, student_path, info, fingerprint)
    distributed.barrier()


def _check_models(
    teacher: TeacherConfig | None,
    teacher_paths: Sequence[str],
    student: StudentConfig,
    student_path: str,
    loss: LossConfig,
    train: TrainConfig,
) -> None:
    """Check quantization, heads, attention and MLPs. Only configurations are read."""
    student_config = read_model_config(student_path, student)
    check_student_is_not_quantized(student, student_config)
    # The attention and configuration of every model that runs in training.
    trained: list[tuple[ModelConfig, Any]] = [(student, student_config)]
    if teacher:
        for path, source in zip(teacher_paths, teacher.sources, strict=True):
            config = read_model_config(path, source)
            check_quantized_teacher(teacher, config)
            if loss.name != "sft":
                trained.append((teacher, config))
    for model, config in trained:
        check_attention(model.attn_implementation, config)
        if train.mlp_tile_tokens:
            empty = empty_model(config, trust_remote_code=model.trust_remote_code)
            dense_mlps(decoder_layers(empty), train.mlp_tile_tokens)
        if loss.fused:
            check_family(config.model_type)


def _prune(source: str, target: Path, student: StudentConfig) -> dict[str, Any]:
    """Write the student without some of its layers. Returns the entries for the manifest."""
    assert student.prune is not None
    layers = parse_layers(student.prune.drop_layers)
    model = load_recipe_model(source, student)
    parameters_before = sum(p.numel() for p in model.parameters())
    model = prune_layers(model, layers)
    parameters_after = sum(p.numel() for p in model.parameters())
    log.info(
        "pruned the student: layers=%d parameters=%.1fM before=%.1fM",
        len(layers),
        parameters_after / 1e6,
        parameters_before / 1e6,
    )
    remove_partial_directories(target)
    with atomic_directory(target) as folder, quiet():
        model.save_pretrained(folder)
        load_tokenizer(source, trust_remote_code=student.trust_remote_code).save_pretrained(folder)
    return {
        "dropped_layers": layers,
        "parameters_before": parameters_before,
        "parameters_after": parameters_after,
    }


def _heal(
    run: RunDirectory,
    student: StudentConfig,
    student_path: str,
    teacher: TeacherConfig | None,
    teacher_paths: tuple[str, ...],
    loss: LossConfig,
    train: TrainConfig,
    seed: int,
    fingerprint: str,
) -> None:
    """Train the student for a few steps of plain distillation, on a random part of the data."""
    # A single stage over a random part of the data.
    split = TokenizedSplit.open(run.data, "train")
    order = permutation(len(split), seed=seed, stage=0, epoch=0)
    plan = single_stage_plan(
        order,
        steps=student.heal_steps,
        batch_size=train.batch_size,
        temperature=HEAL_TEMPERATURE,
        sft_ratio=HEAL_SFT_RATIO,
    )
    # Forward KL, unless the tokenizers need another loss; one learning rate schedule.
    if loss.name not in CROSS_TOKENIZER_LOSSES:
        loss = LossConfig(name="fkl", chunk_memory_mb=loss.chunk_memory_mb, fused=loss.fused)
    teacher = teacher.single_stage if teacher else None
    training = TrainingRun(
        run.models / "heal",
        fingerprint,
        "heal",
        plan,
        student_path,
        student,
        teacher_paths[: len(teacher.sources)] if teacher else (),
        teacher,
        loss,
        train.model_copy(update={"lr_restart": "never"}),
        seed,
    )
    run_training(run, training)


def _write_result(
    run: RunDirectory,
    teacher_paths: tuple[str, ...],
    student_path: str,
    info: dict[str, Any],
    fingerprint: str,
) -> None:
    """Write models.json and the manifest, with the student's files if they are in the run."""
    paths = {
        "teacher": teacher_paths[0] if teacher_paths else None,
        "other_teachers": teacher_paths[1:],
        "student": movable_model_path(run, student_path),
    }
    write_json(run.models / "models.json", paths)
    files = [run.models / "models.json"]
    if Path(student_path).is_relative_to(run.models):
        files += [path for path in sorted(Path(student_path).rglob("*")) if path.is_file()]
    write_manifest(run.models, "init-student", fingerprint, info=info, files=files)
