"""Workflow steps that test_families runs in separate processes, for several runs in turn.

python family_worker.py score RUN...       score each run with its own vLLM engine
python family_worker.py until-train RUN... each run in this process
python family_worker.py reload RUN...      the exported student in vLLM, then other weights
launch/train.sh --ranks R --module family_worker train RUN...
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.runtime import distributed
from pocl_ds.workflow.files import read_json, write_json
from pocl_ds.workflow.pipeline import run_in_process
from pocl_ds.workflow.run_dir import RunDirectory


def step(name: str, run: Path, *overrides: str) -> None:
    """Run one workflow step in this process."""
    recipe = load_recipe(str(run / "recipe.yaml"), list(overrides))
    run_in_process(name, recipe, RunDirectory(run))


def train(run: Path) -> None:
    """Train with the online teacher and move that training to online/, then with cached hidden
    states.
    """
    step("train", run)
    if distributed.rank() == 0:
        shutil.move(run / "train", run / "online")
    distributed.barrier()
    for name in ("cache-teacher", "train"):
        step(name, run, "teacher.mode=cached_hidden_states")
    if distributed.rank() == 0:
        step("export", run)
    distributed.barrier()


def until_train(run: Path) -> None:
    """Run every step up to the training."""
    for name in ("preprocess", "init-student", "rank", "plan", "train"):
        step(name, run)


def reload(run: Path) -> None:
    """Write reloaded.json: the engine's log-probabilities of the sequences in task.json, with the
    weights of the exported student and of the other model.
    """
    from pocl_ds.config import GenerationConfig
    from pocl_ds.generation.backends import open_generator
    from pocl_ds.models.load import load_model, load_tokenizer

    task: dict[str, Any] = read_json(run / "task.json")
    other = load_model(task["other"])
    path = str(run / "export")
    generator = open_generator(
        path, GenerationConfig(max_num_seqs=8), load_tokenizer(path), max_length=96, threads=1
    )
    log_probs = {}
    for name in ("exported", "loaded"):
        if name == "loaded":
            generator.load_weights((key, value.detach()) for key, value in other.named_parameters())
        log_probs[name] = [
            values.tolist() for values in generator.log_probs(task["sequences"], task["starts"])
        ]
    generator.close()
    write_json(run / "reloaded.json", log_probs)


def speed_up_vllm() -> None:
    """Skip the slowest parts of an engine with a tiny model: vLLM inspects each new architecture in
    a separate process, and collects garbage eleven times per engine.
    """
    from pocl_ds.generation import vllm_engine

    os.environ.update(vllm_engine.ENVIRONMENT)
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()
    gc.collect = lambda *_: 0


TASKS: dict[str, Callable[[Path], None]] = {
    "score": lambda run: step("score", run),
    "train": train,
    "reload": reload,
    "until-train": until_train,
}

if __name__ == "__main__":
    collect = gc.collect
    if sys.argv[1] in ("score", "reload"):
        speed_up_vllm()
    for run in sys.argv[2:]:
        TASKS[sys.argv[1]](Path(run))
        collect()
