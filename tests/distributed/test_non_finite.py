"""Numbers that go wrong stop a training, with the batch's samples on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from gradient_worker import write_split

from pocl_ds.artifacts import RunDirectory
from pocl_ds.config import LossConfig, StudentConfig, TeacherConfig, TrackingConfig, TrainConfig
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.distill.stage import Job, make_trainer
from pocl_ds.errors import NumericalError


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_the_batch_is_named(what: str, tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path) -> None:
    run = RunDirectory(tmp_path)
    run.data.mkdir()
    write_split(run.data)
    for part in ("ids.npy", "index.npy", "tokens.bin"):
        (run.data / f"validation.{part}").write_bytes((run.data / f"train.{part}").read_bytes())
    train = TrainConfig(engine="torch", batch_size=4, micro_batch_size=2, tracking=TrackingConfig(tensorboard=False))
    plan = single_stage_plan(np.arange(12), steps=3, batch_size=4, tau=1.0, alpha=0.3)
    job = Job(run.train, "one", "train", plan, np.arange(12), str(tiny_llama), StudentConfig(model=str(tiny_llama)),
              str(tiny_llama_untied), TeacherConfig(model=str(tiny_llama_untied)), LossConfig(), train, 0)  # fmt: skip
    trainer = make_trainer(run, job)
    if what == "loss":
        next(trainer.engine.module.parameters()).data.fill_(math.nan)
    else:
        trainer.engine.step = lambda lr: math.inf  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match=rf"the {what} is (nan|inf) at step 1 \(samples s\d+, "):
        trainer.run()
    found = json.loads((run.train / "non_finite.json").read_text())
    assert found["step"] == 1 and len(found["ids"]) == 4 and found["what"] == what
    assert not list((run.train / "checkpoints").glob("step-*"))
