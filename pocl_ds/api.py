"""The Python interface of a whole run: `run` is `pocl run`, `submit` is `pocl submit`, and
`distill` builds the recipe of a run first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe, load_recipe
from pocl_ds.errors import DataError, ModelError, StepFailedError
from pocl_ds.workflow.files import atomic_directory, atomic_write, read_json
from pocl_ds.workflow.fork_server import ForkServer
from pocl_ds.workflow.pipeline import run_pipeline
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import check_is_run_directory
from pocl_ds.workflow.steps import STEP_NAMES, check_step_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Data = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class RunResult:
    """Paths and metrics of a finished run.

    metrics: model ("teacher", "initial", "student", "baseline") -> `loss` and `kl` in nats per
    token, and `benchmarks`: name -> ROUGE-L (0 to 1), exact match and further measures.
    """

    run_dir: Path
    student: Path
    report: Path
    metrics: dict[str, dict[str, Any]]


def run(recipe: Recipe | str | Path, run_dir: str | Path) -> RunResult:
    """Run every workflow step whose result is missing, as `pocl run` does.

    Args:
        recipe: a recipe, the path of its YAML file, or the name of a shipped one.
        run_dir: folder of the results; a second call continues where the first one stopped.

    Raises:
        PoclError: an error that the user can fix, in one sentence.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(str(recipe))
    directory = RunDirectory(run_dir)
    with ForkServer() as server:
        code = run_pipeline(recipe, directory, server)
    if code:
        raise StepFailedError(
            f"the run stopped with exit code {code}: the failed step printed why, see "
            f"{directory.logs}",
            exit_code=code,
        )
    return RunResult(
        run_dir=directory.path,
        student=directory.export,
        report=directory.report / "report.html",
        metrics=read_json(directory.evaluation / "results.json")["models"],
    )


def submit(
    recipe: Recipe | str | Path,
    profile: str | Path,
    run_dir: str | Path,
    *,
    nodes: int | None = None,
    start: str = STEP_NAMES[0],
    until: str = STEP_NAMES[-1],
) -> dict[str, str]:
    """Submit a run to SLURM as dependent jobs, as `pocl submit` does.

    Args:
        recipe: a recipe, the path of its YAML file, or the name of a shipped one.
        profile: file or name of the cluster's profile.
        run_dir: folder of the results, which all nodes see.
        nodes: nodes of the training; None: as many as `launch.ranks` fills.
        start: first step to submit; those before it must be finished.
        until: last step to submit.

    Returns:
        The ids of the jobs by name; empty if every step is finished.

    Raises:
        PoclError: an error that the user can fix, in one sentence.
    """
    # Checks of a submission load transformers, which a run need not.
    from pocl_ds.cluster.profile import load_profile
    from pocl_ds.cluster.submit import Submission
    from pocl_ds.cluster.submit_checks import check_submission

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(str(recipe))
    check_step_names({"start": start, "until": until})
    submission = Submission(
        RunDirectory(run_dir),
        recipe,
        load_profile(str(profile)),
        nodes=nodes,
        start=start,
        until=until,
    )
    check_submission(submission)
    return submission.submit() if submission.jobs else {}


def distill(
    *,
    teacher: str | Path | PreTrainedModel,
    student: str | Path | PreTrainedModel,
    data: Data,
    output_dir: str | Path,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    **fields: Any,
) -> RunResult:
    """Distil a teacher into a student and return the paths and metrics of the run.

    Args:
        teacher: Hub name, folder, .gguf file, or a model in memory with its `teacher_tokenizer`.
        student: the same, with its `student_tokenizer`.
        data: Hub name, file, or records (a list of dicts or a `datasets.Dataset`) in one of the
            formats of docs/data.md.
        output_dir: the run directory. Models and records in memory are written below `inputs/`.
        fields: recipe fields, with `__` between section and field: `train__lr=2e-5`,
            `curriculum__num_subsets=3`. docs/reference/recipe.md lists them.

    Raises:
        PoclError: an error that the user can fix, in one sentence.

    Example:
        >>> result = distill(
        ...     teacher="meta-llama/Llama-3.1-8B-Instruct",
        ...     student="meta-llama/Llama-3.2-1B-Instruct",
        ...     data="my_instructions.jsonl",
        ...     output_dir="runs/llama",
        ...     train__lr=2e-5,
        ... )
        >>> result.student
        PosixPath('runs/llama/export')
    """
    directory = RunDirectory(output_dir)
    check_is_run_directory(directory)  # before inputs are written into it
    tree: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", directory.path.resolve().name).strip("-._")
        or "run",
        "teacher": {"model": _model_source(teacher, teacher_tokenizer, directory, "teacher")},
        "student": {"model": _model_source(student, student_tokenizer, directory, "student")},
        "data": {"source": _data_source(data, directory)},
    }
    for field, value in fields.items():
        *sections, name = field.split("__")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = value
    return run(check_recipe(tree, "distill()"), directory.path)


def _model_source(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: RunDirectory,
    role: str,
) -> str:
    """The recipe's `model`; a model in memory is saved below `inputs/` first."""
    if isinstance(model, (str, Path)):
        return str(model)
    if tokenizer is None:
        raise ModelError(
            f"distill(): {role} is a model in memory without a tokenizer: pass {role}_tokenizer"
        )
    folder: Path = directory.inputs / role
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return str(folder)


def _data_source(data: Data, directory: RunDirectory) -> str:
    """The recipe's `data.source`; records in memory are written below `inputs/` first."""
    if isinstance(data, (str, Path)):
        return str(data)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"distill(): data is a {type(data).__name__}: pass a file, a Hub name, a list of "
            "records or one split of a datasets.DatasetDict"
        )
    file: Path = directory.inputs / "data.jsonl"
    with atomic_write(file) as stream:
        for record in data:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return str(file)
