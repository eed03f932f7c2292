"""A loss or gradient that is not finite never reaches the weights: the run stops, with the batch
on disk, or skips the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradient_worker import write_split

from pocl_ds.config import (
    LossConfig,
    StudentConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.data.tokenized import SPLIT_FILES
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.errors import NumericalError
from pocl_ds.losses.fused_head import LossSums
from pocl_ds.training.build import build_trainer
from pocl_ds.training.trainer import Trainer
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.run_dir import RunDirectory

pytestmark = pytest.mark.usefixtures("single_rank")
ENGINES = ["torch", "student_zero3", "student_zero2"]


def make(run: RunDirectory, teacher: Path, student: Path, engine: str, **changes: Any) -> Trainer:
    """A training of three steps of two micro-batches each."""
    run.data.mkdir(parents=True)
    write_split(run.data)
    for part in SPLIT_FILES:
        (run.data / f"validation.{part}").write_bytes((run.data / f"train.{part}").read_bytes())
    kind = "torch" if engine == "torch" else "deepspeed"
    train = TrainConfig(
        engine=kind,
        batch_size=4,
        micro_batch_size=2,
        tracking=TrackingConfig(tensorboard=False),
        layout="padded",
        **changes,
    )
    plan = single_stage_plan(np.arange(12), steps=3, batch_size=4, temperature=1.0, sft_ratio=0.3)
    config = StudentConfig(
        model=str(student), **({} if engine == "torch" else {"ds_config": engine})
    )
    training = TrainingRun(
        run.train,
        "one",
        "train",
        plan,
        str(student),
        config,
        (str(teacher),),
        TeacherConfig(model=str(teacher)),
        LossConfig(),
        train,
        0,
    )
    if kind == "deepspeed":
        start_deepspeed()
    return build_trainer(run, training)


def poison(trainer: Trainer, steps: list[int], quantity: str) -> None:
    """Make the loss, or the gradient, of the second micro-batch of some steps NaN."""
    engine, calls = trainer.models.engine, iter(range(1000))
    forward = engine.forward

    def poisoned(*arguments: Any) -> LossSums:
        total, kd, ce = forward(*arguments)
        if engine.module.training and next(calls) in [2 * step + 1 for step in steps]:
            nan = float("nan")
            if quantity == "loss":
                return total * nan, kd, ce
            total = total.clone()
            total.register_hook(lambda gradient: gradient * nan)
        return total, kd, ce

    engine.forward = poisoned


def weights(trainer: Trainer) -> dict[str, Any]:
    return {
        name: value.clone()
        for name, value in trainer.models.engine.gathered_state_dict(
            trainer.models.engine.module.model
        ).items()
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("quantity", ["loss", "gradient norm"])
def test_the_run_stops_before_the_update_and_names_the_batch(
    quantity: str, engine: str, tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    run = RunDirectory(tmp_path)
    trainer = make(run, tiny_llama_untied, tiny_llama, engine)
    before = weights(trainer)
    poison(trainer, [0], quantity)
    with pytest.raises(
        NumericalError,
        match=rf"the {quantity} is (nan|inf) at step 1 \(samples s\d+, .*max_non_finite_steps",
    ):
        trainer.run()
    assert all(value.equal(before[name]) for name, value in weights(trainer).items())
    record = json.loads((run.train / "non_finite-step-00000001.json").read_text())
    assert record["step"] == 1 and record["quantity"] == quantity
    assert [len(batch["ids"]) for batch in record["micro_batches"]] == [2, 2]
    assert [batch["loss_sum"] == "nan" for batch in record["micro_batches"]] == [
        False,
        quantity == "loss",
    ]
    assert not list((run.train / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_step_changes_nothing(
    engine: str, tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    """The other steps give the weights of a run without it."""
    trainer = make(
        RunDirectory(tmp_path / "one"),
        tiny_llama_untied,
        tiny_llama,
        engine,
        max_non_finite_steps=1,
    )
    poison(trainer, [1], "gradient norm")
    trainer.run()
    kinds = [
        json.loads(line)["kind"]
        for line in (tmp_path / "one" / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    assert kinds == ["step", "skipped", "step", "validation"]

    without_step = make(RunDirectory(tmp_path / "two"), tiny_llama_untied, tiny_llama, engine)
    train_step = without_step.train_step

    def skip_second_step(position: Any) -> None:
        if position.step != 1:
            train_step(position)

    without_step.train_step = skip_second_step  # type: ignore[method-assign]
    without_step.run()
    skipped_weights, reference_weights = weights(trainer), weights(without_step)
    assert all(skipped_weights[name].equal(reference_weights[name]) for name in reference_weights)


def test_more_skipped_steps_than_allowed(
    tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path
) -> None:
    trainer = make(
        RunDirectory(tmp_path), tiny_llama_untied, tiny_llama, "torch", max_non_finite_steps=1
    )
    poison(trainer, [0, 2], "loss")
    with pytest.raises(NumericalError, match="the loss is nan at step 3"):
        trainer.run()
