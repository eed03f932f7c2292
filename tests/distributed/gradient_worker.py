"""Ranks of test_gradients: compare the gradients of one trainer step with those of plain float64
PyTorch, for each case.

    launch/train.sh --ranks R --module gradient_worker CASES.json OUT.json
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from pocl_ds.config import LossConfig, TrainConfig, ds_config
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.thought_spans import ThoughtFinder
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import DeepSpeedEngine, sharded_loading, start_deepspeed
from pocl_ds.losses import divergence, fused_inputs
from pocl_ds.models.attention import PER_SAMPLE
from pocl_ds.models.load import load_model
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts.policies import OffPolicy
from pocl_ds.runtime import distributed, sequence_parallel
from pocl_ds.teachers.routed import DomainTeachers, RoutedModel
from pocl_ds.teachers.teacher import OnlineTeacher, TeacherEnsemble
from pocl_ds.training import compilation
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.compilation import prepare_layers
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.monitor import TrainingMonitor
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.student import Student
from pocl_ds.training.thought_weights import ThoughtWeights
from pocl_ds.training.trainer import Trainer

SIZE, TEMPERATURE, SFT_RATIO = 320, 1.5, 0.3
THOUGHT_TOKENS = 4  # of a response, in the case with a thought_weight
WEIGHTS = (3.0, 1.0)  # of two teachers
TEACHER_OF_ROW = (
    np.arange(12) % 3 // 2
)  # of two teachers by domain: every third sample has the second


class Recorder(DeepSpeedEngine):
    """An engine that records the gradients of a step and does not apply them."""

    gradients: dict[str, torch.Tensor]

    def step(self, lr: float) -> float:
        named = dict(self.module.model.named_parameters())
        self.gradients = {
            name: safe_get_full_grad(parameter).clone() for name, parameter in named.items()
        }
        return 0.0


class FirstTokens(ThoughtFinder):
    """Takes the first tokens of every response for its thought."""

    def __init__(self) -> None:
        pass

    def thought_tokens(self, prompt: Any, response: Any) -> int:
        return min(THOUGHT_TOKENS, len(response))


def write_split(folder: Path) -> list[tuple[int, list[int]]]:
    """Write 12 samples of different lengths, one of them without a loss token. The longest is
    in one batch with the shortest.
    """
    source = np.random.default_rng(0)
    samples = [
        (int(source.integers(1, 6)), source.integers(2, SIZE, int(source.integers(7, 40))).tolist())
        for _ in range(11)
    ]
    samples.append((5, source.integers(2, SIZE, 5).tolist()))
    names = [f"s{i}" for i in range(len(samples))]
    save_split(folder, "train", names, [ids for _, ids in samples], [n for n, _ in samples])
    return samples


def trainer_gradients(case: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of one step, gathered on every rank."""
    sequence_parallel.start(case.get("sequence_parallel", 1))
    train = TrainConfig(
        batch_size=12,
        micro_batch_size=case["micro"],
        micro_batch_tokens=case.get("tokens"),
        compile=case.get("compile", "none"),
        mlp_tile_tokens=case.get("tile"),
    )
    compilation.BACKEND = "aot_eager"  # the same graphs, without a C++ compiler
    ranks = distributed.world_size()
    frozen = ds_config.resolve_teacher(
        "teacher_zero3", dtype="float32", ranks=ranks, micro_batch_size=1
    )
    config = ds_config.resolve_student("student_zero3", train=train, dtype="float32", ranks=ranks)
    # Shard also the smallest parameters.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    ids = VocabMap(SIZE)
    teachers = []
    for path in (case["teacher"], *case.get("ensemble", ()), *case.get("by_domain", ())):
        with sharded_loading(frozen):
            model = load_model(path, attention=PER_SAMPLE, dropout=0.0)
            prepare_layers(model, train)
            teachers.append(OnlineTeacher(model, frozen, ids))
    teacher: Any = teachers[0]
    if case.get("ensemble"):
        teacher = TeacherEnsemble(teachers, WEIGHTS)
    elif case.get("by_domain"):
        models = tuple(RoutedModel("", "") for _ in teachers)
        teacher = DomainTeachers(models, dict(enumerate(teachers)), {"train": TEACHER_OF_ROW})
    with sharded_loading(config):
        model = load_model(case["student"], attention=PER_SAMPLE, dropout=0.0)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepare_layers(model, train)
    offload = case.get("offload", False)
    module = Student(model, ids, chunk_bytes=1 << 20, offload=offload).train()
    fused_inputs.chunk_sizes = lambda *_: fused_inputs.ChunkSizes(case["rows"], 2)
    engine = Recorder(module, train, config)
    plan = single_stage_plan(
        np.arange(12), steps=1, batch_size=12, temperature=TEMPERATURE, sft_ratio=SFT_RATIO
    )
    sampler = Sampler(plan, 0)
    data = TrainingData(
        TokenizedSplit.open(folder, "train"),
        None,
        Layout(case["packed"], 0.0),
        train.micro_batch_size,
        train.micro_batch_tokens,
        teacher_of_row={"train": TEACHER_OF_ROW} if case.get("by_domain") else None,
    )
    if "thought_weight" in case:
        data.thought_weights = ThoughtWeights(FirstTokens(), case["thought_weight"])
    trainer = Trainer(
        TrainingModels(engine, teacher),
        data,
        TrainingSchedule(plan, sampler, train),
        LossConfig(name=case["loss"], token_rule=case.get("token_rule"), chunk_memory_mb=1),
        ResponseSource(OffPolicy()),
        Checkpoints(folder / "checkpoints", train.checkpoint, fingerprint=""),
        TrainingMonitor(folder, "", train),
    )
    trainer.train_step(sampler.position(0))
    return engine.gradients


def plain_gradients(
    case: dict[str, Any], samples: list[tuple[int, list[int]]]
) -> dict[str, torch.Tensor]:
    """The same gradients in one process: float64, one sample at a time, full logits, autograd."""
    student: Any = load_model(case["student"], dropout=0.0).double().train()
    loaded: list[Any] = [
        load_model(path).double()
        for path in (case["teacher"], *case.get("ensemble", ()), *case.get("by_domain", ()))
    ]
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS] if case.get("ensemble") else [1.0]
    weights = []
    for prompt, ids in samples:
        weights.append(torch.ones(len(ids) - prompt, dtype=torch.float64))
        weights[-1][:THOUGHT_TOKENS] = case.get("thought_weight", 1.0)
    total = float(torch.cat(weights).sum())
    for row, (prompt, tokens) in enumerate(samples):
        ids = torch.tensor([tokens])
        teachers = [loaded[TEACHER_OF_ROW[row]]] if case.get("by_domain") else loaded
        with torch.no_grad():
            tempered_logits = [
                teacher(input_ids=ids).logits[0, prompt - 1 : -1, :SIZE] / TEMPERATURE
                for teacher in teachers
            ]
            target = (
                TEMPERATURE
                * sum(
                    share * logits.softmax(-1)
                    for share, logits in zip(shares, tempered_logits, strict=True)
                ).log()
            )
        logits = student(input_ids=ids).logits[0, prompt - 1 : -1, :SIZE]
        ce = logits.sum() * 0
        if len(logits):
            by_token = torch.nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="none")
            ce = (weights[row] * by_token).sum()
        if "token_rule" in case:
            kd = adakd_divergence(case, logits, target)
        else:
            by_token = divergence(
                case["loss"], logits, target, temperature=TEMPERATURE, reduction="none"
            )
            kd = (weights[row] * by_token).sum()
        ((SFT_RATIO * ce + (1 - SFT_RATIO) * kd) / total).backward()
    return {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in student.named_parameters()
    }


def adakd_divergence(
    case: dict[str, Any], logits: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The sum of the divergence of each token at its own temperature, by the formulas."""
    options = {"strength": 0.5, **case["token_rule"]["options"]}
    total = logits.sum() * 0
    for z_q, z_p in zip(logits, target, strict=True):
        roots = [side.detach().softmax(-1).sqrt() for side in (z_q, z_p)]
        distance = float((roots[0] - roots[1]).square().sum() / 2) ** 0.5
        if distance >= options["threshold"]:
            relative = math.tanh(math.log(distance / options["center"]))
            temperature = TEMPERATURE * math.exp(-options["strength"] * relative)
            total = total + divergence(case["loss"], z_q, z_p, temperature=temperature)
    return total


def main(cases: list[dict[str, Any]], out: Path) -> None:
    """Write the largest error of each case, relative to the largest gradient."""
    start_deepspeed()
    errors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = write_split(folder)
        for case in cases:
            gradients = trainer_gradients(case, folder)
            if distributed.rank() == 0:
                reference = plain_gradients(case, samples)
                assert gradients.keys() == reference.keys()
                scale = max(float(g.abs().max()) for g in reference.values())
                errors.append(
                    max(
                        float((gradients[n].double() - reference[n]).abs().max()) for n in reference
                    )
                    / scale
                )
            distributed.barrier()
    if distributed.rank() == 0:
        out.write_text(json.dumps(errors))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
