"""The loss of an optimizer step by who wrote its responses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocl_ds.config import LossConfig, TrainConfig
from pocl_ds.curriculum.plan import build_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.trainer import Trainer

LOSS = LossConfig.model_validate(
    {
        "name": "jsd",
        "options": {"beta": 0.1},
        "scale_by_temperature_squared": False,
        "by_writer": {"student": {"name": "srkl", "options": {"skew": 0.3}}},
    }
)


@pytest.mark.parametrize(
    ("writer", "name", "options"),
    [
        ("data", "jsd", {"beta": 0.1}),
        ("teacher", "jsd", {"beta": 0.1}),
        ("student", "srkl", {"skew": 0.3}),
    ],
)
def test_the_divergence_follows_the_writer(
    writer: str, name: str, options: dict[str, float]
) -> None:
    plan = build_plan(
        np.arange(8), num_subsets=2, epochs_per_stage=1, batch_size=4, sft_ratio=(0.3, 0.1)
    )
    trainer: Any = object.__new__(Trainer)
    trainer.loss, trainer.token_rule = LOSS, None
    trainer.schedule = TrainingSchedule(plan, Sampler(plan, 0), TrainConfig())
    for step, (temperature, sft_ratio) in ((0, (1.0, 0.3)), (2, (2.0, 0.1))):
        position = trainer.schedule.sampler.position(step)
        terms = trainer._loss_terms(SimpleNamespace(position=position, writer=writer))
        assert (terms.name, terms.options) == (name, options)
        assert (terms.temperature, terms.sft_ratio) == (temperature, sft_ratio)
        assert not terms.scale_by_temperature_squared


def test_the_writer_of_a_dataset() -> None:
    train, teacher, generated = (SimpleNamespace() for _ in range(3))
    data: Any = TrainingData
    source = data(train, np.arange(2), None, Layout(False, 0.0), 2, teacher_responses=teacher)
    assert [source.writer_of(dataset) for dataset in (train, teacher, generated)] == [
        "data",
        "teacher",
        "student",
    ]
    source = data(train, np.arange(2), None, Layout(False, 0.0), 2)
    assert source.writer_of(generated) == "student"
