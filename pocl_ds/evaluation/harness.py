"""Standard tasks of lm-evaluation-harness (the package lm_eval) for every evaluated model.

Each model runs in its own process, so that its memory is free before the next one:

    python launch/pocl.py pocl_ds.evaluation.harness REQUEST.json

It writes the file that `harness_results` reads. Only this file imports lm_eval.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import EvaluateConfig, HarnessConfig, semantic_fields
from pocl_ds.errors import ArtifactError, ModelError, PoclError, RecipeError
from pocl_ds.evaluation.evaluated_models import model_identity
from pocl_ds.evaluation.harness_results import HarnessResults, harness_file
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.resources import module_command
from pocl_ds.runtime.logs import setup_logging
from pocl_ds.runtime.process_exit import print_error
from pocl_ds.workflow.files import read_json, write_json
from pocl_ds.workflow.manifest import fingerprint, read_part, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

CPU_BATCH_SIZE = 8


def run_harness(
    run: RunDirectory,
    config: EvaluateConfig,
    paths: Mapping[str, str],
    run_process: Callable[[list[str]], int],
    *,
    task_files: Sequence[Any] = (),
    trusted: Collection[str] = (),
) -> None:
    """Run the tasks of `evaluate.harness` with each model. Finished results are reused.

    Args:
        paths: model -> folder or Hub name.
        run_process: runs a command and returns its exit code.
        task_files: digests of the files of `include_path`.
        trusted: the models whose own Python code may run.

    Raises ArtifactError if a task failed; its process has said why.
    """
    if config.harness is None:
        return
    for model, path in paths.items():
        file, expected = harness_file(run, model), _fingerprint(config, path, task_files)
        manifest = read_part(file.parent, f"{file.name}.manifest.json")
        if manifest is not None and manifest.fingerprint == expected:
            log.info("harness: the results of %s are up to date", model)
            continue
        start = time.monotonic()
        log.info("harness: %s: %s", model, ", ".join(config.harness.tasks))
        file.parent.mkdir(parents=True, exist_ok=True)
        request = file.with_suffix(".request.json")
        write_json(
            request,
            {
                "path": path,
                "harness": config.harness.model_dump(mode="json"),
                "generation": config.generation.model_dump(mode="json"),
                "trust_remote_code": model in trusted,
                "file": str(file),
            },
        )
        if run_process([*module_command("pocl_ds.evaluation.harness"), str(request)]):
            raise ArtifactError(
                f"the tasks of evaluate.harness failed with the model {model}, see above: other "
                "results are kept"
            )
        request.unlink(missing_ok=True)
        write_manifest(
            file.parent,
            "harness",
            expected,
            info={"seconds": time.monotonic() - start},
            files=[file],
            name=f"{file.name}.manifest.json",
        )


def _fingerprint(config: EvaluateConfig, path: str, task_files: Sequence[Any]) -> str:
    assert config.harness is not None
    return fingerprint(
        [
            model_identity(path),
            semantic_fields(config.harness),
            resolve_dtype(config.generation.dtype),
            importlib.metadata.version("lm_eval"),
            list(task_files),
        ]
    )


def _run_request(request: Mapping[str, Any]) -> None:
    """Evaluate one model in this process and write its file. Raises RecipeError for a task that
    does not exist, ModelError for what the harness raises.
    """
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    config, path = HarnessConfig.model_validate(request["harness"]), request["path"]
    own_tasks = config.include_path and os.path.expanduser(config.include_path)
    manager = TaskManager(include_path=own_tasks)
    unknown = [task for task in config.tasks if not manager.match_tasks([task])]
    if unknown:
        raise RecipeError(
            f"evaluate.harness.tasks names {unknown[0]}, which lm_eval {lm_eval.__version__} does "
            "not have: `lm_eval ls tasks` lists its tasks, and evaluate.harness.include_path adds "
            "your own"
        )
    on_gpu = torch.cuda.is_available()
    arguments = {
        "pretrained": path,
        "dtype": resolve_dtype(request["generation"]["dtype"]),
        "trust_remote_code": request["trust_remote_code"],
    }
    backend = "hf"
    if on_gpu and request["generation"]["backend"] == "vllm":
        backend = "vllm"
        arguments["tensor_parallel_size"] = request["generation"]["tensor_parallel_size"]
    try:
        results = lm_eval.simple_evaluate(
            model=backend,
            model_args=arguments,
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.max_samples,
            batch_size="auto" if on_gpu else CPU_BATCH_SIZE,
            device="cuda" if on_gpu else "cpu",
            apply_chat_template=config.apply_chat_template,
            bootstrap_iters=0,  # intervals are computed from the values, paired
            task_manager=manager,
        )
    except Exception as error:  # any library that a task uses may raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"lm_eval cannot run {', '.join(config.tasks)} with {path} ({reason}): run "
            f"`lm_eval run --model {backend} --model_args pretrained={path} --tasks "
            f"{config.tasks[0]}` to see more, or leave the task out"
        ) from error
    write_json(Path(request["file"]), _collect(results))


def _collect(results: Any) -> HarnessResults:
    """Means of tasks and groups, and the value of each document where it is one number."""
    collected: HarnessResults = {}
    for task, entry in results["results"].items():
        means = {
            name: float(value)
            for name, value in entry.items()
            if "," in name and "_stderr" not in name and _is_number(value)
        }
        values: dict[str, dict[str, float]] = {name: {} for name in means}
        for sample in results["samples"].get(task, ()):
            for metric in sample["metrics"]:
                name, value = f"{metric},{sample['filter']}", sample.get(metric)
                if name in values and _is_number(value):
                    values[name][str(sample["doc_id"])] = float(value)
        collected[task] = {"means": means, "values": {n: v for n, v in values.items() if v}}
    return collected


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (str, tuple, list)) and math.isfinite(value)
    except TypeError:
        return False


if __name__ == "__main__":
    setup_logging()
    try:
        _run_request(read_json(Path(sys.argv[1])))
    except PoclError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
