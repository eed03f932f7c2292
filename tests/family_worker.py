"""What test_families does outside of pytest's own process, each for several runs one after another.

python family_worker.py score RUN...       an engine of vLLM's for each run
python family_worker.py reload RUN...      the same, with the exported student and then with other weights
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
from pocl_ds.workflow import steps
from pocl_ds.workflow.run_dir import RunDirectory, read_json, write_json


def stage(name: str, run: Path, *overrides: str) -> None:
    """One stage of a run, in this process."""
    recipe = load_recipe(str(run / "recipe.yaml"), list(overrides))
    steps.run_here(name, recipe, RunDirectory(run))


def train(run: Path) -> None:
    """With the live teacher, whose training moves to live/; then with the states that it left on
    disk.
    """
    stage("train", run)
    if distributed.rank() == 0:
        shutil.move(run / "train", run / "live")
    distributed.barrier()
    for name in ("cache-teacher", "train"):
        stage(name, run, "teacher.mode=cached_hidden_states")
    if distributed.rank() == 0:
        stage("export", run)
    distributed.barrier()


def reload(run: Path) -> None:
    """reloaded.json: the engine's log-probabilities of task.json's sequences, of the exported
    student and of the other model.
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
    found = {}
    for name in ("exported", "refreshed"):
        if name == "refreshed":
            generator.refresh({key: value.detach() for key, value in other.named_parameters()})
        found[name] = [
            one.tolist() for one in generator.log_probs(task["sequences"], task["starts"])
        ]
    generator.close()
    write_json(run / "reloaded.json", found)


def without_detours() -> None:
    """What vLLM does for servers takes most of the time here: it looks at each new architecture in
    a process of its own, and collects garbage eleven times an engine. Once a run is enough.
    """
    from pocl_ds.generation import vllm_backend

    os.environ.update(vllm_backend.ENVIRONMENT)
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()
    gc.collect = lambda *_: 0


WORK: dict[str, Callable[[Path], None]] = {
    "score": lambda run: stage("score", run),
    "train": train,
    "reload": reload,
}

if __name__ == "__main__":
    collect = gc.collect
    if sys.argv[1] != "train":
        without_detours()
    for word in sys.argv[2:]:
        WORK[sys.argv[1]](Path(word))
        collect()
