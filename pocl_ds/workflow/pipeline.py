"""The stages in order: what each depends on, whether its result is there and current, and how it is
run.

`pocl run` is nothing more than this list from top to bottom. Stages that need ranks go through
launch/train.sh; those that hold a generation engine get a process of their own, since there is one
engine a process.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.config import Recipe, ds_config, semantic_fields
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.curriculum.plan_step import plan_of
from pocl_ds.curriculum.schedules import stage_values
from pocl_ds.difficulty.shards import unfinished, whole_set
from pocl_ds.errors import ArtifactError, Interrupted, RecipeError
from pocl_ds.resources import LAUNCHER, module_command
from pocl_ds.runtime.tracking import check_wandb
from pocl_ds.workflow import input_digests
from pocl_ds.workflow.run_dir import (
    RunDirectory,
    atomic_write,
    disk_faults,
    fingerprint,
    read_manifest,
    take_lock,
    whole_result,
)

log = logging.getLogger("pocl_ds")

SETTLE = 5.0  # seconds in which others may be entering the same run directory


class InUseError(ArtifactError):
    """Another process holds the run directory."""


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    directory: Callable[[RunDirectory], Path]
    depends: Callable[[Recipe], Any]  # plain values of the recipe that its result follows from
    after: tuple[str, ...]  # stages whose results it reads
    wanted: Callable[[Recipe], bool] = lambda recipe: True


STAGES = (
    Stage(
        "preprocess",
        lambda run: run.data,
        lambda r: [
            semantic_fields(r.data),
            semantic_fields(r.prompt),
            r.student.model,
            r.student.revision,
            input_digests.data_files(r),
            own_tokens(r),
        ],
        (),
    ),
    Stage(
        "init-student",
        lambda run: run.models,
        lambda r: [
            semantic_fields(r.student),
            input_digests.model_files([r.student]),
            teachers(r),
            healing(r),
        ],
        ("preprocess",),
    ),
    Stage(
        "cache-teacher",
        lambda run: run.teacher_cache,
        lambda r: [teachers(r), truncation(r)],
        ("preprocess",),
        lambda r: keeps_teacher(r),
    ),
    Stage(
        "generate-teacher",
        lambda run: run.teacher_responses,
        lambda r: [teachers(r), semantic_fields(r.policy), r.seed, r.score.generation.backend],
        ("preprocess",),
        lambda r: r.policy.uses_teacher_responses,
    ),
    Stage(
        "score",
        lambda run: run.scores,
        lambda r: [semantic_fields(r.score), input_digests.plugin_files(r)],
        ("preprocess", "init-student"),
        lambda r: r.ranking.strategy != "random",
    ),
    Stage(
        "rank",
        lambda run: run.ranking,
        lambda r: [semantic_fields(r.ranking), r.seed, input_digests.plugin_files(r)],
        ("preprocess", "score"),
    ),
    Stage(
        "plan",
        lambda run: run.plan,
        lambda r: [semantic_fields(r.curriculum), r.train.batch_size],
        ("rank",),
    ),
    Stage(
        "train",
        lambda run: run.train,
        lambda r: learning(r),
        ("init-student", "plan", "generate-teacher"),
    ),
    Stage(
        "baseline",
        lambda run: run.baseline,
        lambda r: [learning(r), semantic_fields(r.baseline)],
        ("init-student", "plan", "generate-teacher"),
        lambda r: r.baseline.enabled,
    ),
    Stage(
        "evaluate",
        lambda run: run.evaluation,
        lambda r: [
            semantic_fields(r.evaluate),
            evaluated_models(r),
            input_digests.evaluation_files(r),
        ],
        ("train", "baseline"),
    ),
    Stage("export", lambda run: run.export, lambda r: None, ("evaluate",)),
    Stage("report", lambda run: run.report, lambda r: semantic_fields(r.report), ("evaluate",)),
)
NAMES = tuple(stage.name for stage in STAGES)
OF_TRAINING = ("evaluate", "export", "report")


def wanted_stages(recipe: Recipe, until: str = NAMES[-1]) -> tuple[Stage, ...]:
    """The stages that a recipe asks for, in order, up to one of them."""
    return tuple(stage for stage in STAGES[: NAMES.index(until) + 1] if stage.wanted(recipe))


def own_tokens(recipe: Recipe) -> list[Any] | None:
    """The teacher whose tokens the data is encoded in too."""
    teacher = recipe.teacher if recipe.across_tokenizers else None
    return [teacher.model, teacher.revision] if teacher else None


def healing(recipe: Recipe) -> list[Any] | None:
    """What healing a student follows from, beside the models."""
    if not recipe.student.heal_steps:
        return None
    return [
        semantic_fields(recipe.train),
        semantic_fields(recipe.loss) if recipe.across_tokenizers else None,
        recipe.seed,
    ]


def keeps_teacher(recipe: Recipe) -> bool:
    """Whether there is a stage `teach`."""
    return recipe.teacher is not None and recipe.teacher.mode != "online"


def temperatures(recipe: Recipe) -> tuple[float, ...]:
    """Every temperature that trainings ask the teacher at; validation looks at 1."""
    stages = stage_values(recipe.curriculum.num_subsets, recipe.curriculum.temperature)
    return tuple(
        dict.fromkeys(
            [1.0, *stages, *([recipe.baseline.temperature] if recipe.baseline.enabled else [])]
        )
    )


def truncation(recipe: Recipe) -> list[Any] | None:
    """What a teacher of a few probabilities alone says follows from this; every other mode gives
    the same losses.
    """
    topk = recipe.teacher is not None and recipe.teacher.mode == "cached_topk"
    return [recipe.teacher_cache.top_k, temperatures(recipe)] if topk else None


def teachers(recipe: Recipe) -> list[Any] | None:
    """The teacher, and what lies in the folders that it and others are read from."""
    teacher = recipe.teacher
    return (
        [semantic_fields(teacher), input_digests.model_files([teacher, *teacher.ensemble])]
        if teacher
        else None
    )


def learning(recipe: Recipe) -> list[Any]:
    """What a training's result follows from, beside its plan and its data."""
    configurations = [
        recipe.student.ds_config,
        recipe.teacher.ds_config if recipe.teacher else None,
    ]
    return [
        semantic_fields(recipe.train),
        semantic_fields(recipe.loss),
        semantic_fields(recipe.policy),
        recipe.seed,
        truncation(recipe),
        input_digests.plugin_files(recipe),
        [ds_config.numerics(name) for name in configurations],
    ]


def evaluated_models(recipe: Recipe) -> list[str]:
    """The models that are evaluated: as the recipe says, the baseline where it is trained, the
    teacher where there is one.
    """
    names = [name for name in recipe.evaluate.models if name != "teacher" or recipe.teacher]
    if recipe.baseline.enabled and "baseline" not in names:
        names.append("baseline")
    return [name for name in names if name != "baseline" or recipe.baseline.enabled]


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """What each stage's result must carry to belong to this recipe."""
    found: dict[str, str] = {}
    wanted = {stage.name for stage in STAGES if stage.wanted(recipe)}
    for stage in STAGES:
        before = [found[name] for name in stage.after if name in wanted]
        found[stage.name] = fingerprint([stage.name, stage.depends(recipe), before])
    return found


def finished(run: RunDirectory, recipe: Recipe) -> dict[str, bool]:
    """Which stages have a whole result of this recipe; what is said of a training, only where that
    is there too.
    """
    expected, done = fingerprints(recipe), dict[str, bool]()
    wanted = {stage.name for stage in STAGES if stage.wanted(recipe)}
    for stage in STAGES:
        if stage.name == "score":
            done["score"] = run.scores.is_dir() and not unfinished(
                run, recipe.score, expected["score"]
            )
            continue
        there = stage.name not in OF_TRAINING or all(
            done[name] for name in stage.after if name in wanted
        )
        done[stage.name] = (
            there and whole_result(stage.directory(run), expected[stage.name]) is not None
        )
    return done


def _fingerprint_of(stage: Stage, run: RunDirectory) -> str | None:
    """What a stage's whole result carries; None where it is unfinished."""
    if stage.name == "score":
        return whole_set(run)
    manifest = read_manifest(stage.directory(run))
    return None if manifest is None else manifest.fingerprint


def enter(run: RunDirectory, recipe: Recipe) -> None:
    """Make the run directory this recipe's, or refuse one that holds finished work of another.

    Only fields whose stages are unfinished, and operational ones, may differ from those of the last
    time.
    """
    _check_ds_configs(recipe)
    if strange := sorted(set(str(run.path.absolute())) & set("*?[")):
        raise ArtifactError(
            f"{run.path.absolute()} has {strange[0]!r} in it, which DeepSpeed takes for a pattern "
            f"when it looks "
            "for its checkpoints: choose another --run-dir"
        )
    if run.recipe.is_file():
        before = load_recipe(str(run.recipe))
        old, new = fingerprints(before), fingerprints(recipe)
        for stage in STAGES:
            found = _fingerprint_of(stage, run)
            if stage.name not in OF_TRAINING and found not in (None, new[stage.name]):
                changed = ", ".join(
                    _differences(before.model_dump(), recipe.model_dump())
                ) or input_digests.changed_file(recipe)
                raise ArtifactError(
                    f"run directory {run.path} holds the finished stage {stage.name!r} of another "
                    f"recipe (changed: {changed}): "
                    "choose another --run-dir, or undo the change"
                )
        if old != new:
            log.info(
                "the recipe changed for stages that are not finished: %s is written anew",
                run.recipe,
            )
    _check_place(run)
    if recipe.train.tracking.wandb and not finished(run, recipe)["train"]:
        check_wandb()
    with atomic_write(run.recipe) as stream:
        stream.write(dump_recipe(recipe))


def _check_place(run: RunDirectory) -> None:
    """Refuse a folder of something else, before anything is written there."""
    if run.recipe.is_file() or not run.path.is_dir():
        return
    if any(path.name not in ("logs", ".lock") for path in run.path.iterdir()):
        raise ArtifactError(
            f"{run.path} is not empty and holds no recipe.yaml: choose another --run-dir"
        )


def join(run: RunDirectory, recipe: Recipe) -> None:
    """As `enter`, beside processes that may hold the run directory: where one does, its recipe must
    be this one, to the letter.

    Stages that wait in it read that file, and shards of one recipe enter at the same time.
    """
    begin = time.monotonic()
    while True:
        try:
            with locked(run):
                return enter(run, recipe)
        except InUseError:
            if run.recipe.is_file() and run.recipe.read_text(encoding="utf-8") == dump_recipe(
                recipe
            ):
                return None
            if time.monotonic() - begin > SETTLE:
                raise
        time.sleep(0.2)


def check_sizes(run: RunDirectory, recipe: Recipe) -> None:
    """Raise RecipeError where a training asks for more samples than the stage `data` has found:
    what only the data say is said before hours of scoring.
    """
    manifest = read_manifest(run.data)
    if manifest is None:
        return
    splits, batch = manifest.info["splits"], recipe.train.batch_size
    samples = int(splits["train"]["samples"])
    plan = plan_of(range(samples), recipe.curriculum, batch_size=batch)
    shortest = (
        min(stage.steps for stage in plan.stages)
        if recipe.train.lr_restart == "per_stage"
        else plan.total_steps
    )
    if recipe.train.warmup_steps >= shortest:
        where = "a stage" if recipe.train.lr_restart == "per_stage" else "the run"
        raise RecipeError(
            f"train.warmup_steps={recipe.train.warmup_steps} never ends in the {shortest} steps "
            f"of {where}, so "
            "that train.lr would not be reached: lower it"
        )
    if recipe.student.heal_steps and samples < batch:
        raise RecipeError(
            f"train.batch_size={batch} is more than the {samples} training samples: healing needs "
            f"one whole batch"
        )
    needs = (
        "policy.name=distillm" if recipe.policy.name == "distillm" else "train.checkpoint.keep_best"
    )
    if (recipe.policy.name == "distillm" or recipe.train.checkpoint.keep_best) and not splits[
        "validation"
    ]["samples"]:
        raise RecipeError(
            f"{needs} follows the validation loss, and the data holds no validation sample: raise "
            "data.validation_fraction, or name a file in data.validation"
        )
    every = recipe.train.validate_every_n_steps
    if recipe.policy.name == "distillm" and every and every >= plan.total_steps:
        raise RecipeError(
            f"train.validate_every_n_steps={every} never comes in the {plan.total_steps} steps of the "
            f"run, so that the "
            "probability of policy.name=distillm would not move: lower it"
        )
    if recipe.policy.name == "distillm" and recipe.policy.replay_buffer_size > samples:
        raise RecipeError(
            f"policy.replay_buffer_size={recipe.policy.replay_buffer_size} is more than the {samples} training samples: "
            f"make it smaller"
        )


@contextlib.contextmanager
def locked(run: RunDirectory) -> Iterator[int]:
    """Hold a run directory for one pipeline at a time; its children inherit the lock, so no orphan
    is overlooked.
    """
    path = run.path / ".lock"
    _check_place(run)
    with disk_faults(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            take_lock(handle, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(
                f"{run.path} is in use by another pocl process: wait for it, or end it first"
            ) from None
        os.set_inheritable(handle, True)
        yield handle
    finally:
        os.close(handle)


def run_stage(
    name: str,
    run: RunDirectory,
    recipe: Recipe,
    lock: int | None = None,
    *,
    shard: tuple[int, int] | None = None,
) -> int:
    """Run one unfinished stage to its end, or the I-th of its N shards. Returns the exit code; the
    failed process has said why.

    lock: of a caller that holds the run directory.
    """
    words = [
        name,
        "--run-dir",
        str(run.path),
        *(() if shard is None else ("--shard", f"{shard[0]}/{shard[1]}")),
    ]
    command = [*module_command("pocl_ds.cli.main"), *words]
    if needs_ranks(name, recipe):
        launcher = ["bash", str(LAUNCHER), "--ranks", str(recipe.launch.ranks)]
        if recipe.launch.threads_per_rank:
            launcher += ["--threads", str(recipe.launch.threads_per_rank)]
        return call([*launcher, *words], lock)
    if name == "evaluate":
        for model in evaluated_models(recipe):
            if code := _answers([*command, "--model", model], recipe, lock):
                return code
    return call(command, lock)


def _answers(command: list[str], recipe: Recipe, lock: int | None) -> int:
    """One model's answers, by evaluate.data_parallel_size engines side by side, each on GPUs or cores of its
    own.
    """
    count, gpus = (
        recipe.evaluate.data_parallel_size,
        recipe.evaluate.generation.tensor_parallel_size,
    )
    if count == 1:
        return call(command, lock)
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = (
        names.split(",") if names else [str(number) for number in range(torch.cuda.device_count())]
    )
    if torch.cuda.is_available() and len(visible) < count * gpus:
        raise RecipeError(
            f"evaluate.data_parallel_size={count} with tensor_parallel={gpus} needs {count * gpus} GPUs, "
            f"and {len(visible)} "
            "are visible: lower it"
        )
    commands, environments = [], []
    for number in range(count):
        commands.append([*command, "--shard", f"{number}/{count}"])
        own = ",".join(visible[number * gpus : (number + 1) * gpus])
        cores = max((os.cpu_count() or 1) // count, 1)
        environments.append(
            {"CUDA_VISIBLE_DEVICES": own}
            if torch.cuda.is_available()
            else {"OMP_NUM_THREADS": str(cores)}
        )
    return call_together(commands, environments, lock)


def needs_ranks(name: str, recipe: Recipe) -> bool:
    """Whether a stage is run by launch.ranks processes."""
    return name in ("cache-teacher", "train", "baseline") or (
        name == "init-student" and recipe.student.heal_steps > 0
    )


def call(command: list[str], lock: int | None = None) -> int:
    """Run a command in its own session, handing on every signal that reaches us, and wait for its
    end. See `call_together`.
    """
    return call_together([command], [{}], lock)


def call_together(
    commands: list[list[str]], environments: list[dict[str, str]], lock: int | None = None
) -> int:
    """As `call`, several at once, each with variables of its own. Returns the first exit code that
    is not 0, when all ended.

    A child has said why it left with a code; one that a signal ended has not. Raises what our own
    handler of a signal raises, where no child answered it: one that was only starting died of it (a
    rank's Python with code 1), one at its end never noticed. Raises Interrupted for a child that
    was killed.
    """
    children: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def hand_on(number: int, _: Any) -> None:
        came.append(number)
        for child in children:
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    heard = [
        number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    ]  # what we ignore, children do too
    before = {number: signal.signal(number, hand_on) for number in heard}
    try:
        for command, own in zip(commands, environments, strict=True):
            if not came:
                children.append(_start(command, own, lock))
                if came:  # while it was not on the list
                    children[-1].send_signal(came[-1])
        codes = [child.wait() for child in children]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = next((code for code in codes if code > 0), 0)
    if came and code in (0, 1):
        signal.raise_signal(came[0])
    killed = next((-code for code in codes if code < 0), 0)
    if killed and not code:
        raise Interrupted(
            f"a process of this stage was ended by {signal.Signals(killed).name}, often because "
            f"memory ran out: "
            "finished work is kept, the same command goes on",
            exit_code=128 + killed,
        )
    return code


def _start(command: list[str], own: dict[str, str], lock: int | None) -> subprocess.Popen[bytes]:
    """A child in a session of its own, with our variables and `own`. Ranks get their threads from
    launch/train.sh.
    """
    environment = {
        **os.environ,
        "POCL_PYTHON": sys.executable,
        "POCL_WITHIN": "1",
        "PYTHONUNBUFFERED": "1",
        **own,
    }
    environment.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # vLLM's remarks on NUMA are for those who ask
    if command[0] != "bash":
        environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    # Ctrl-C waits until launch/pocl.py is ready for it. A shell could not hear it any more, so the
    # launcher of ranks is left out.
    held = set() if command[0] == "bash" else {signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        return subprocess.Popen(
            command,
            start_new_session=True,
            env=environment,
            pass_fds=() if lock is None else (lock,),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_ds_configs(recipe: Recipe) -> None:
    """Contradictions between a ds_config and the recipe are found before anything is loaded."""
    ranks = recipe.launch.ranks
    ds_config.resolve_student(
        recipe.student.ds_config, train=recipe.train, dtype=recipe.student.dtype, ranks=ranks
    )
    if recipe.teacher:
        ds_config.resolve_teacher(
            recipe.teacher.ds_config,
            dtype=recipe.teacher.dtype,
            ranks=ranks,
            micro_batch_size=recipe.train.micro_batch_size,
        )


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of fields that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in {**old, **new}
            for name in _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if old == new else [prefix]
