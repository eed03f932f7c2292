"""The command `pocl`: parse, decide where a stage runs, print. Heavy imports happen inside
commands.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_ds import __version__
from pocl_ds.cli import cluster as cluster
from pocl_ds.cli import report as report
from pocl_ds.cli import results as finished
from pocl_ds.cli import study as studies

if TYPE_CHECKING:
    from pocl_ds.config import Recipe
    from pocl_ds.workflow.run_dir import RunDirectory
    from pocl_ds.workflow.steps import Asked

COMMANDS = {
    "run": (
        "every stage in order, each only where its result is missing",
        "pocl run quickstart --run-dir runs/first",
    ),
    "preprocess": (
        "read, split and encode the instruction data",
        "pocl preprocess my.yaml --run-dir runs/x data.source=my.jsonl",
    ),
    "init-student": (
        "make the initial student: fetch, prune, heal",
        "pocl init-student --run-dir runs/x",
    ),
    "cache-teacher": (
        "keep what the teacher says, where teacher.mode is not live",
        "pocl cache-teacher --run-dir runs/x --shard 0/4",
    ),
    "generate-teacher": (
        "let the teacher answer every training prompt, where policy.name asks for it",
        "pocl generate-teacher --run-dir runs/x",
    ),
    "score": (
        "answer every training prompt; ROUGE-L and cross-entropy",
        "pocl score --run-dir runs/x --shard 2/8",
    ),
    "rank": ("order the samples from easy to hard", "pocl rank --run-dir runs/x"),
    "plan": ("cut the order into stages", "pocl plan --run-dir runs/x"),
    "train": ("distil, from where it stopped", "pocl train --run-dir runs/x"),
    "baseline": (
        "plain KD on as many sample visits, to compare with",
        "pocl baseline --run-dir runs/x baseline.enabled=true",
    ),
    "evaluate": (
        "answer the benchmarks and score the answers",
        "pocl evaluate --run-dir runs/x --model student",
    ),
    "export": (
        "write the student as a Hugging Face folder with a model card",
        "pocl export --run-dir runs/x --out my-student",
    ),
    "report": (
        "one page and one table of everything a run found; of several, one page that compares them",
        "pocl report runs/a runs/b runs/c",
    ),
    "bench": ("measure a part of this program on this machine", "pocl bench rouge"),
}

# What a stage's memory follows from, beside the models' own size.
SMALLER = {
    **dict.fromkeys(
        ("init-student", "train", "baseline"),
        "lower train.micro_batch_size or loss.chunk_memory_mb, set "
        "student.activation_checkpointing=true, or take more GPUs: `pocl estimate` says how many",
    ),
    "cache-teacher": "lower teacher_cache.max_batch_tokens, or shard the teacher with teacher.ds_config",
    **dict.fromkeys(
        ("generate-teacher", "score"),
        "lower score.generation.max_num_seqs and score.generation.max_num_batched_tokens",
    ),
    "evaluate": "lower evaluate.generation.max_num_seqs and max_num_batched_tokens; the held-out "
    "loss needs each model whole on one "
    "GPU, and evaluate.held_out_loss=false leaves it out",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry of the command line. Returns the exit code: 0, 2 for a fault the user can mend, 130 for
    Ctrl-C.
    """
    from pocl_ds.runtime.credentials import hide
    from pocl_ds.runtime.process_exit import interrupted, last_word, leave_when_asked, leave_word

    leave_when_asked()
    error = ""
    try:
        code, error = _main(arguments)
    except SystemExit as leaving:  # argparse, or a signal
        code = leaving.code if isinstance(leaving.code, int) else 1
    except (Exception, KeyboardInterrupt) as defect:
        if interrupted():
            code, error = _interrupted("pocl")
        else:
            last_word(hide(traceback.format_exc()).rstrip())
            code, error = 1, hide(f"{type(defect).__name__}: {defect}")
    leave_word(code, error)
    return code


def _main(arguments: list[str] | None) -> tuple[int, str]:
    """Exit code, and the sentence that says why it is not 0."""
    from pocl_ds.errors import PoclError, memory_fault
    from pocl_ds.runtime.process_exit import interrupted

    options = _options(arguments)
    try:
        if options.command == "bench":
            return _bench(options), ""
        for others in (cluster, finished, studies):
            if options.command in others.FUNCTIONS:
                return others.run_command(options), ""
        return _command(options), ""
    except PoclError as error:
        return (
            _interrupted(f"pocl {options.command}")
            if interrupted()
            else (error.exit_code, _say(options, str(error)))
        )
    except (RuntimeError, MemoryError) as error:
        if (said := memory_fault(error)) is None:
            raise
        remedy = SMALLER.get(options.command, "take a machine with more")
        return 2, _say(options, f"memory ran out ({said}): finished work is kept; {remedy}")
    except OSError as error:
        from pocl_ds.workflow.run_dir import file_fault

        if isinstance(error, BrokenPipeError):
            return 0, ""
        if (said := file_fault(error)) is None:
            raise
        return 2, _say(options, said)
    except KeyboardInterrupt:
        return _interrupted(f"pocl {options.command}")


def _interrupted(who: str) -> tuple[int, str]:
    from pocl_ds.runtime.process_exit import last_word

    last_word(f"{who}: interrupted; finished work is kept, the same command goes on")
    return 130, "interrupted"


def _say(options: argparse.Namespace, sentence: str) -> str:
    """Print a sentence as one line, and return it: texts of a user's files may hold a terminal's
    commands, and secrets.
    """
    from pocl_ds.runtime.credentials import hide
    from pocl_ds.runtime.process_exit import last_word

    said = hide(sentence)
    shown = "".join(
        letter if letter.isprintable() else " " if letter.isspace() else repr(letter)[1:-1]
        for letter in said
    )
    last_word(f"pocl {options.command}: {shown}")
    return said


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; overrides may stand anywhere, which argparse does not take by
    itself.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        options.arguments += rest  # a benchmark reads its own
    elif any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)} (pocl {options.command} --help)")
    elif rest:
        options.words += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pocl",
        description="Distil a large language model into a small one, by curriculum.",
        epilog="start: pocl run quickstart --run-dir runs/quickstart · each command: pocl COMMAND "
        "--help",
    )
    parser.add_argument("--version", action="version", version=f"pocl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, example) in {
        **COMMANDS,
        **finished.COMMANDS,
        **studies.COMMANDS,
        **cluster.COMMANDS,
    }.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog=f"example: {example}",
        )
        if name == "bench":
            command.add_argument("name", help="which benchmark; `list` names them")
            command.add_argument("arguments", nargs="*", help="of the benchmark")
            continue
        if others := next((one for one in (finished, studies) if name in one.COMMANDS), None):
            others.add_arguments(name, command)
            continue
        if name in cluster.COMMANDS:
            cluster.add_arguments(name, command)
            if name not in cluster.RECIPE_COMMANDS:
                continue
        command.add_argument(
            "words",
            nargs="*",
            metavar="RECIPE | field=value",
            help="a recipe file or the name of a shipped one (left out: the run directory's), and "
            "dotted overrides",
        )
        command.add_argument(
            "--run-dir", type=Path, help="where results go (default: runs/ and the recipe's name)"
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="show the resolved recipe and what would run; do nothing",
        )
        if name == "run":
            command.add_argument(
                "--baseline",
                action="store_true",
                help="also train plain KD on as many sample visits",
            )
            command.add_argument(
                "--ranks", type=int, help="processes that share the models (launch.ranks)"
            )
            stages = list(COMMANDS)[1:-1]  # without `run` and `bench`
            command.add_argument(
                "--until",
                choices=stages,
                default=stages[-1],
                metavar="STAGE",
                help="the last one (report)",
            )
        if name in ("score", "cache-teacher"):
            command.add_argument(
                "--shard", metavar="I/N", help=f"only shard I of N, from 0; sets {name}.shards=N"
            )
        if name == "evaluate":
            command.add_argument(
                "--shard", metavar="I/N", help="with --model: only part I of N of its work, from 0"
            )
            command.add_argument("--model", choices=finished.MODELS, help="only this one's answers")
            command.add_argument("--benchmark", help="with --model: only this benchmark")
            command.add_argument("--seed", type=int, help="with --model: only this seed")
        if name == "export":
            command.add_argument(
                "--out", type=Path, help="folder to write (default: export/ in the run directory)"
            )
        if name == "report":
            report.add_arguments(command)
    return parser


def _command(options: argparse.Namespace) -> int:
    import os

    from pocl_ds.errors import ResourceError
    from pocl_ds.runtime.process_exit import place_among_ranks
    from pocl_ds.runtime.tracking import keep_log, setup_logging
    from pocl_ds.workflow import pipeline, steps

    rank, ranks = place_among_ranks()
    setup_logging(rank, world_size=ranks)
    if options.command == "submit":
        return cluster.submit(options, _recipes(options))
    if options.command == "report" and report.compared(options):
        return 0
    recipe, run = _recipe(options)
    if options.command == "estimate":
        return cluster.size(options, recipe)
    if options.dry_run:
        return _dry_run(options, recipe, run)
    if "RANK" in os.environ:  # one rank of a stage that another process of ours started
        if options.command == "run":
            raise ResourceError(
                f"RANK={rank} makes this process one of several ranks, which `pocl run` starts "
                f"itself: unset RANK and WORLD_SIZE"
            )
        if rank == 0:
            keep_log(run.logs / f"{options.command}.log")
        steps.run_here(options.command, recipe, run, _asked(options))
        return 0
    _check_part(options)
    inherited = "POCL_WITHIN" in os.environ  # a stage of `pocl run`, which holds the lock
    if options.command == "run":
        with pipeline.locked(run) as lock:
            pipeline.enter(run, recipe)
            keep_log(run.logs / "run.log")
            return _run(recipe, run, lock, options.until)
    if not inherited:
        pipeline.join(run, recipe)
        whole_evaluation = (
            options.command == "evaluate" and not options.model
        )  # one process a model, then the table
        if (
            options.command == "cache-teacher" and options.shard
        ):  # beside other shards, each with ranks of its own
            return pipeline.run_stage("cache-teacher", run, recipe, shard=options.shard)
        if pipeline.needs_ranks(options.command, recipe) or whole_evaluation:
            with pipeline.locked(run) as lock:
                return pipeline.run_stage(options.command, run, recipe, lock)
    keep_log(run.logs / f"{options.command}.log")
    steps.run_here(options.command, recipe, run, _asked(options))
    return 0


def _recipe(options: argparse.Namespace) -> tuple[Recipe, RunDirectory]:
    """The resolved recipe and the run directory of a command line."""
    from pocl_ds.config.recipe_file import load_recipe
    from pocl_ds.errors import RecipeError
    from pocl_ds.workflow.run_dir import RunDirectory

    overrides = [word for word in options.words if "=" in word]
    names = [word for word in options.words if "=" not in word]
    if getattr(options, "baseline", False):
        overrides.append("baseline.enabled=true")
    if getattr(options, "ranks", None) is not None:
        overrides.append(f"launch.ranks={options.ranks}")
    if getattr(options, "shard", None):
        options.shard = _shard(options.shard)
        if options.command != "evaluate":  # whose parts are of one model, and not the recipe's
            overrides.append(f"{options.command}.shards={options.shard[1]}")
    if len(names) > 1:
        raise RecipeError(
            f"two recipes are named ({names[0]}, {names[1]}): give one, overrides have the form "
            f"field=value"
        )
    if names:
        recipe = load_recipe(names[0], overrides)
    elif options.run_dir and (options.run_dir / "recipe.yaml").is_file():
        recipe = load_recipe(str(options.run_dir / "recipe.yaml"), overrides)
    else:
        raise RecipeError(
            "no recipe is named: give a file or a shipped name (pocl run quickstart), or a "
            "--run-dir that has one"
        )
    return recipe, RunDirectory(options.run_dir or Path("runs") / recipe.name)


def _recipes(options: argparse.Namespace) -> list[tuple[Recipe, RunDirectory]]:
    """The recipe of a command line; of several, each with a run directory of its own below
    --run-dir.
    """
    from pocl_ds.config.recipe_file import load_recipe
    from pocl_ds.errors import RecipeError
    from pocl_ds.workflow.run_dir import RunDirectory

    files = [word for word in options.words if "=" not in word]
    if len(files) < 2:
        return [_recipe(options)]
    overrides = [word for word in options.words if "=" in word]
    recipes = [load_recipe(file, overrides) for file in files]
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(
            f"two recipes are named {twice!r}: each needs a name of its own (field name)"
        )
    return [
        (recipe, RunDirectory((options.run_dir or Path("runs")) / recipe.name))
        for recipe in recipes
    ]


def _shard(text: str) -> tuple[int, int]:
    from pocl_ds.errors import RecipeError

    number, _, count = text.partition("/")
    if not (
        re.fullmatch("[0-9]{1,9}", number)
        and re.fullmatch("[0-9]{1,9}", count)
        and int(number) < int(count)
    ):
        raise RecipeError(f"--shard {text}: write I/N with I from 0 to N-1, as in 2/8")
    return int(number), int(count)


def _run(recipe: Recipe, run: RunDirectory, lock: int, until: str) -> int:
    from pocl_ds.runtime.tracking import log
    from pocl_ds.workflow import pipeline

    done = pipeline.finished(run, recipe)
    for stage in pipeline.wanted_stages(recipe, until):
        if done[stage.name]:
            log.info("%s: done already", stage.name)
            continue
        start = time.monotonic()
        if code := pipeline.run_stage(stage.name, run, recipe, lock):
            return code
        log.info("%s: done in %.0f s", stage.name, time.monotonic() - start)
    if until == pipeline.NAMES[-1]:
        _summary(run)
    return 0


def _summary(run: RunDirectory) -> None:
    from pocl_ds.evaluation.tables import results_table
    from pocl_ds.workflow.run_dir import read_json

    print()
    print(results_table(read_json(run.evaluation / "results.json")))
    print(f"\nstudent  {run.export}\nreport   {run.report / 'report.html'}")


def _dry_run(options: argparse.Namespace, recipe: Recipe, run: RunDirectory) -> int:
    from pocl_ds.config.recipe_file import dump_recipe
    from pocl_ds.workflow import pipeline

    print(dump_recipe(recipe), end="")
    print(f"\nrun directory: {run.path}")
    done = (
        pipeline.finished(run, recipe)
        if run.recipe.is_file()
        else dict.fromkeys(pipeline.NAMES, False)
    )
    for stage in pipeline.wanted_stages(recipe, getattr(options, "until", pipeline.NAMES[-1])):
        if options.command in ("run", stage.name):
            ranks = (
                f" on {recipe.launch.ranks} ranks"
                if pipeline.needs_ranks(stage.name, recipe)
                else ""
            )
            print(f"{stage.name:<10} {'done' if done[stage.name] else f'would run{ranks}'}")
    return 0


def _asked(options: argparse.Namespace) -> Asked:
    """What a command line says of its stage, beside the recipe."""
    from pocl_ds.workflow.steps import Asked

    return Asked(**{field.name: getattr(options, field.name, None) for field in fields(Asked)})


def _check_part(options: argparse.Namespace) -> None:
    """A part of an evaluation is of one model."""
    from pocl_ds.errors import RecipeError

    part = [
        word for word in ("shard", "benchmark", "seed") if getattr(options, word, None) is not None
    ]
    if options.command == "evaluate" and not options.model and part:
        raise RecipeError(f"--{part[0]} is a part of one model's answers: say whose with --model")


def _bench(options: argparse.Namespace) -> int:
    import importlib

    from pocl_ds.bench import BENCHMARKS
    from pocl_ds.errors import RecipeError

    if options.name == "list":
        print("\n".join(f"{name:<10} {purpose}" for name, (_, purpose) in BENCHMARKS.items()))
        return 0
    if options.name not in BENCHMARKS:
        raise RecipeError(
            f"there is no benchmark {options.name!r}: take one of {', '.join(BENCHMARKS)}"
        )
    importlib.import_module(BENCHMARKS[options.name][0]).run(options.arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
