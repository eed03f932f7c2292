"""Metrics that are read one step late, the parts of a step, its utilization and its profile."""

from __future__ import annotations

import gzip
import json
import logging
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting_student import STEPS, Engine, RecordingPolicy, trainer

from pocl_ds.config import TrainConfig
from pocl_ds.engines.torch_engine import TorchEngine
from pocl_ds.errors import DisagreementError, Interrupted, NumericalError
from pocl_ds.models.cost import ModelShape
from pocl_ds.models.memory import TrainingSetup
from pocl_ds.models.peak_flops import peak_flops
from pocl_ds.training.profiling import StepProfiler
from pocl_ds.training.sample_flops import SampleFlops
from pocl_ds.training.step_exchange import StepExchange
from pocl_ds.training.step_timer import StepTimer
from pocl_ds.training.utilization import Utilization

TIMES = ("seconds", "tokens_per_second", "tokens_per_second_per_rank", "memory_gib")


class Split(Engine):
    """Loses everything at one step: the loss and the gradient norm are NaN."""

    def __init__(self, nan_step: int) -> None:
        super().__init__()
        self.nan_step = nan_step

    def forward(self, batch: Any, *arguments: Any) -> Any:
        loss, kd, ce = super().forward(batch, *arguments)
        factor = math.nan if self.module.training and self.steps == self.nan_step else 1.0
        return loss * factor, kd, ce * factor

    def step(self, lr: float) -> float:
        super().step(lr)
        return math.nan if self.steps - 1 == self.nan_step else 1.0


def records(folder: Path) -> list[dict[str, Any]]:
    """All metrics in their order, without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if name not in TIMES and not name.endswith("_seconds")
        }
        for line in lines
    ]


def test_metrics_that_are_read_late_are_the_same_in_the_same_order(tmp_path: Path) -> None:
    for late in (False, True):
        training = trainer(tmp_path / str(late), Engine(), RecordingPolicy(False))
        training.reads_late = late
        training.run()
    early, late_records = records(tmp_path / "False"), records(tmp_path / "True")
    assert early == late_records
    assert [record["step"] for record in early] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_a_late_record_is_written_when_the_next_step_has_run_backward(tmp_path: Path) -> None:
    """Before that step's update: a step that is not finite stops the run there."""
    engine = Split(nan_step=3)
    training = trainer(tmp_path, engine, RecordingPolicy(False))
    training.reads_late = True
    with pytest.raises(NumericalError, match="the loss is nan at step 4"):
        training.run()
    # Steps 1 to 4 have called the engine's step, and the fifth was not updated.
    assert engine.steps == 4
    assert [record["step"] for record in records(tmp_path) if record["kind"] == "step"] == [1, 2, 3]


def test_a_signal_that_is_read_late_stops_one_step_later_with_everything_saved(
    tmp_path: Path,
) -> None:
    engine = Engine({0: lambda: signal.raise_signal(signal.SIGTERM)})
    training = trainer(tmp_path, engine, RecordingPolicy(False))
    training.reads_late = True
    with pytest.raises(Interrupted, match=f"after step 2 of {STEPS}"):
        training.run()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 2]
    training = trainer(tmp_path, engine := Engine(), RecordingPolicy(False))
    training.run()
    assert training.first_step == 2 and engine.steps == STEPS
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_a_difference_between_ranks_is_raised_before_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two vectors stand for two ranks: of step 3 one of them has another hash."""
    engine = Engine()
    training = trainer(tmp_path, engine, RecordingPolicy(False))
    facts_of_step_3 = training._facts(training.batches._plan(training.schedule.sampler.position(2)))

    def two_ranks(values: torch.Tensor) -> torch.Tensor:
        other = values.clone()
        other[-1] += float(engine.steps == 1)  # at the end of step 1, which compares step 3
        return torch.stack([values, other])

    monkeypatch.setattr("pocl_ds.runtime.distributed.gather_vectors", two_ranks)
    monkeypatch.setattr(
        "pocl_ds.runtime.distributed.gather_objects",
        lambda value: [value, {**value, "micro-batches": 7}, value],
    )
    with pytest.raises(DisagreementError, match="rank 1 differs .*micro-batches 7 instead of 1"):
        training.run()
    assert engine.steps == 1 and facts_of_step_3["step"] == 2


def test_an_exchange_keeps_sums_flags_and_norms() -> None:
    sums = torch.tensor([1.5, -2.0, math.nan], dtype=torch.float64)
    outcome = StepExchange(
        sums, torch.tensor(0.5), stopping=False, is_writing=True, is_damaged=False, facts={"a": 1}
    ).read()
    assert (outcome.total_sum, outcome.kd_sum, outcome.grad_norm) == (1.5, -2.0, 0.5)
    assert math.isnan(outcome.sft_sum) and outcome.is_writing and outcome.ranks_agree
    assert not outcome.stopping and not outcome.is_damaged


def test_parts_of_a_step_sum_to_its_time() -> None:
    timer = StepTimer(torch.device("cpu"))
    for part, seconds in (("data", 0.01), ("student", 0.02), ("data", 0.01)):
        with timer.measure(part):
            time.sleep(seconds)
    time.sleep(0.03)
    timer.stop()
    parts = timer.breakdown()
    assert sum(parts.values()) == pytest.approx(timer.seconds)
    assert parts["data_seconds"] >= 0.02 and parts["student_seconds"] >= 0.02
    assert parts["wait_seconds"] >= 0.03 and parts["teacher_seconds"] == 0


def test_the_plain_engine_skips_an_update_on_the_device() -> None:
    """With a non-finite gradient neither weights, moments nor the step count change."""
    torch.manual_seed(0)
    train = TrainConfig(batch_size=1, micro_batch_size=1, max_grad_norm=0.5)
    engines = [TorchEngine(torch.nn.Linear(4, 3), train) for _ in range(2)]
    engines[1].module.load_state_dict(engines[0].module.state_dict())
    for factor in (1.0, math.inf, math.nan, -2.0):
        for engine, values in zip(
            engines, ([factor], [factor] if abs(factor) < 3 else []), strict=True
        ):
            for value in values:
                loss = engine.forward(torch.ones(1, 4)).square().sum() * value
                engine.backward(loss, normalizer=1, is_last=True)
                norm = engine.step(1e-2)
                assert bool(norm.isfinite()) == math.isfinite(value)
    first, second = ([*e.module.parameters()] for e in engines)
    assert all(a.equal(b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
    states = [e.optimizer.state[p] for e in engines for p in (e.parameters[0],)]
    assert states[0]["step"] == states[1]["step"] == 2
    assert states[0]["exp_avg"].equal(states[1]["exp_avg"])


def test_utilization_counts_forward_backward_and_the_teacher() -> None:
    """Against the sums written out: 6 N per token for the student, 2 N for the teacher, and
    attention.
    """
    shape = ModelShape("llama", 1000, 10, 800, 200, 200, 2, 20, 10, 8, 8, False)
    setup = TrainingSetup(1, teacher_mode="online")
    flops = SampleFlops(shape, [shape, shape], setup)
    lengths, loss_tokens = np.array([3, 5]), np.array([2, 4])
    attention = 2 * 8 * sum(2 * n * (n + 1) for n in (3, 5))
    forward = 2 * 800 * 8 + attention + 2 * 200 * 6
    assert flops.of(lengths, loss_tokens).sum() == (3 + 2) * forward
    assert Utilization(flops, peak=1e6).of_step(lengths, loss_tokens, 0.5) == 5 * forward / 0.5e6
    # Where samples have different teachers, each is read by one.
    for teachers in ([0, 1], [1, 1]):
        assert flops.of(lengths, loss_tokens, np.array(teachers)).sum() == (3 + 1) * forward


def test_cost_of_a_sample_is_its_arithmetic_relative_to_a_token() -> None:
    """Written out: linear maps and head by tokens, attention by squared tokens, and the teacher
    that reads the sample, a third of what the student takes.
    """
    shape = ModelShape("llama", 1000, 10, 800, 200, 200, 2, 20, 10, 8, 8, False)
    large = replace(shape, matrix_parameters=8000)
    lengths, loss_tokens = np.array([100, 100, 50]), np.array([10, 90, 10])

    def forward(matrix: int, length: int, loss: int) -> int:
        return 2 * matrix * length + 2 * 2 * length * (length + 1) * 8 + 2 * 200 * loss

    token = 3 * forward(800, 1, 0)
    expected = [
        (3 * forward(800, length, loss) + forward(matrix, length, loss)) / token * 1024
        for length, loss, matrix in ((100, 10, 800), (100, 90, 8000), (50, 10, 800))
    ]
    flops = SampleFlops(shape, [shape, large], TrainingSetup(1, teacher_mode="online"))
    costs = flops.costs(lengths, loss_tokens, np.array([0, 1, 0]))
    assert costs.dtype == np.int64 and costs.tolist() == [round(cost) for cost in expected]
    # Without a teacher's arithmetic the student's alone counts.
    alone = SampleFlops(shape, [], TrainingSetup(1, teacher_mode="none")).costs(
        lengths, loss_tokens
    )
    assert alone[0] == round(3 * forward(800, 100, 10) / token * 1024)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("CPU", None),
    ],
)
def test_peak_of_a_card(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_profiled_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A trace with these steps alone, and a table of ten entries; also if the run ends first."""
    training = trainer(tmp_path, Engine(), RecordingPolicy(False))
    training.profiler = StepProfiler(tmp_path / "profile", (STEPS - 1, STEPS + 3))
    with caplog.at_level(logging.INFO, "pocl_ds"):
        training.run()
    with gzip.open(tmp_path / "profile" / "steps-5-6.json.gz") as stream:
        names = {event.get("name") for event in json.load(stream)["traceEvents"]}
    steps = {name for name in names if str(name).startswith("optimizer step ")}
    assert steps == {"optimizer step 5", "optimizer step 6"}
    table = (tmp_path / "profile" / "steps-5-6.txt").read_text()
    assert "Self CPU" in table and len(table.splitlines()) <= 20
    assert "profile steps=5-6" in caplog.text


def test_the_first_profiled_step_comes_first() -> None:
    with pytest.raises(ValueError, match="the first step 4 comes after the last step 2"):
        TrainConfig.model_validate({"profile_steps": [4, 2]})
