"""The training loop with a student that is one number: validation, signals, resuming."""

from __future__ import annotations

import json
import logging
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting_student import Engine, RecordingPolicy, trainer

from pocl_ds.errors import Interrupted


def validations(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"]


@pytest.mark.parametrize(
    ("adaptive", "validated_steps"), [(True, [0, 2, 4, 6]), (False, [2, 4, 6])]
)
@pytest.mark.parametrize("stop", [None, 0, 2, 3])
def test_an_adaptive_policy_knows_the_loss_before_the_first_step(
    adaptive: bool, validated_steps: list[int], stop: int | None, tmp_path: Path
) -> None:
    """It gets this loss once, also if the training is stopped: later losses are compared with
    that of the untrained student.
    """
    policy = RecordingPolicy(adaptive)
    if stop is not None:
        callbacks = {stop: lambda: signal.raise_signal(signal.SIGTERM)}
        with pytest.raises(Interrupted):
            trainer(tmp_path, Engine(callbacks), RecordingPolicy(adaptive)).run()
    trainer(tmp_path, Engine(), policy).run()
    assert policy.losses == validated_steps
    assert [record["step"] for record in validations(tmp_path)] == validated_steps


def test_validations_before_the_first_checkpoint_are_not_recorded_twice(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path, Engine({2: kill}), RecordingPolicy(True)).run()
    assert [record["step"] for record in validations(tmp_path)] == [0, 2]
    trainer(tmp_path, Engine(), policy := RecordingPolicy(True)).run()
    assert policy.losses == [0, 2, 4, 6]
    assert [record["step"] for record in validations(tmp_path)] == [0, 2, 4, 6]


def test_validation_uses_samples_of_all_sources_and_always_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file may be sorted by source; its order, the seed and the step do not change the choice."""
    names = [f"{kind}-{number}" for kind in "abcd" for number in range(100)]
    selections = []
    for seed in range(2):
        engine, folder = Engine(), tmp_path / str(seed)
        with caplog.at_level(logging.INFO, "pocl_ds"):
            trainer(folder, engine, RecordingPolicy(False), names, seed).run()
        validations_rows = np.array(engine.validated_rows).reshape(3, 64)
        selections += [sorted(names[row] for row in rows) for rows in validations_rows]
        assert all(
            record["samples"] == 64 and record["total_samples"] == 400
            for record in validations(folder)
        )
        random.Random(0).shuffle(names)
    assert all(selection == selections[0] for selection in selections)
    assert all(8 <= sum(name.startswith(kind) for name in selections[0]) <= 24 for kind in "abcd")
    assert (
        "train: validation uses 64 of 400 samples, chosen by the hash of their ids" in caplog.text
    )
