"""The commands of a cluster: submit, status, cancel, resume, logs, profile, doctor."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocl_ds.cluster.submit import Submission
    from pocl_ds.config import Recipe
    from pocl_ds.workflow.run_dir import RunDirectory

COMMANDS = {
    "submit": (
        "hand a run to SLURM as dependent jobs",
        "pocl submit my.yaml --profile gpu --nodes 4 --run-dir runs/x",
    ),
    "status": (
        "what a submitted run is doing, or several below a folder",
        "pocl status runs/x --watch",
    ),
    "watch": ("a run live in the terminal, from its directory alone", "pocl watch runs/x"),
    "cancel": ("cancel a submitted run's jobs; finished work is kept", "pocl cancel runs/x"),
    "resume": ("submit what is left of a run", "pocl resume runs/x"),
    "logs": ("what a job or a rank said", "pocl logs runs/x train --rank 1 -f"),
    "profile": ("write a first profile of this cluster", "pocl profile detect > my-cluster.yaml"),
    "doctor": ("look at this machine before a run", "pocl doctor --run-dir runs/x"),
    "estimate": (
        "memory, traffic and hours of a run before it starts",
        "pocl estimate my.yaml --nodes 4 --gpu a100-40g",
    ),
}
RECIPE_COMMANDS = ("submit", "estimate")  # they read one as the stages do
REFRESH = 5.0


def add_arguments(name: str, command: argparse.ArgumentParser) -> None:
    """The arguments of one of these commands."""
    if name in ("submit", "resume"):
        command.add_argument(
            "--test-only", action="store_true", help="ask the scheduler when the jobs would start"
        )
    if name == "submit":
        command.add_argument(
            "--profile",
            required=True,
            help="a file, or a name in slurm/profiles/ or ~/.config/pocl/profiles/",
        )
        command.add_argument(
            "--nodes",
            type=int,
            help="nodes of the trainings (default: as many as launch.ranks fills)",
        )
        return
    if name == "estimate":
        command.add_argument("--nodes", type=int, default=1)
        command.add_argument("--gpus-per-node", type=int, default=8, help="one rank each")
        command.add_argument(
            "--gpu",
            default="h100-80g",
            help="h200-141g, h100-80g, a100-80g, a100-40g, l40s-48g, ...",
        )
        command.add_argument(
            "--network-gbps", type=float, default=400, help="of a node, gigabits a second"
        )
        command.add_argument(
            "--samples", type=int, help="training samples (default: the paper's 11,435)"
        )
        command.add_argument("--prompt-tokens", type=float, help="mean of a prompt")
        command.add_argument("--response-tokens", type=float, help="mean of a response")
        command.add_argument(
            "--utilisation",
            type=float,
            default=0.4,
            help="share of the GPU's peak that arithmetic reaches",
        )
        command.add_argument(
            "--write", type=Path, metavar="FILE", help="write the recipe with the numbers that fit"
        )
        return
    if name == "profile":
        command.add_argument("action", choices=("detect", "show"))
        command.add_argument("name", nargs="?", help="show: which profile")
        command.add_argument("--partition", help="detect: this one (default: the one with GPUs)")
        return
    if name == "doctor":
        command.add_argument(
            "--run-dir", type=Path, default=Path("runs"), help="where runs will be written"
        )
        return
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    if name == "status":
        command.add_argument("--watch", action="store_true", help=f"again every {REFRESH:.0f} s")
    if name == "watch":
        command.add_argument(
            "--once",
            action="store_true",
            help="draw once and end, as it does where the output is no terminal",
        )
    if name == "resume":
        command.add_argument(
            "--dry-run", action="store_true", help="print scripts and jobs; do nothing"
        )
    if name == "logs":
        command.add_argument("job", nargs="?", help="which job (default: the newest log)")
        command.add_argument("--rank", type=int, help="of this rank (default: the job's own log)")
        command.add_argument("-f", "--follow", action="store_true", help="as it grows")


def submit(options: argparse.Namespace, recipes: list[tuple[Recipe, RunDirectory]]) -> int:
    """`pocl submit`: one run, or several; nothing is submitted before all of them are looked at."""
    from pocl_ds.cluster.profile import load_profile
    from pocl_ds.cluster.submit import Submission
    from pocl_ds.errors import RecipeError

    if options.nodes is not None and options.nodes < 1:
        raise RecipeError(f"--nodes {options.nodes}: it is at least 1")
    profile = load_profile(options.profile)
    for submission in [
        Submission(run, recipe, profile, nodes=options.nodes) for recipe, run in recipes
    ]:
        _hand_in(options, submission)
    return 0


def size(options: argparse.Namespace, recipe: Recipe) -> int:
    """`pocl estimate`: 0 where it fits, 2 where it does not."""
    from pocl_ds.cluster.estimate import Asked, Sizes, device_of, numbers, page
    from pocl_ds.config.recipe_file import dump_recipe, override_recipe
    from pocl_ds.errors import RecipeError
    from pocl_ds.models.estimate import Layout
    from pocl_ds.workflow.run_dir import atomic_write

    for name in (
        "nodes",
        "gpus_per_node",
        "network_gbps",
        "samples",
        "prompt_tokens",
        "response_tokens",
        "utilisation",
    ):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise RecipeError(f"--{name.replace('_', '-')} {value:g}: it must be greater than 0")
    layout = Layout(options.nodes, options.gpus_per_node, options.network_gbps / 8 * 1e9)
    given = {
        name: value
        for name in ("samples", "prompt_tokens", "response_tokens", "utilisation")
        if (value := getattr(options, name)) is not None
    }
    sizes = Sizes(recipe, Asked(layout, device_of(options.gpu), **given))
    lines, found = page(sizes)
    print("\n".join(lines))
    if found is None:
        return 2
    if options.write:
        with atomic_write(options.write) as stream:
            stream.write(dump_recipe(override_recipe(recipe, numbers(sizes, found))))
        print(f"written: {options.write}")
    return 0


def run_command(options: argparse.Namespace) -> int:
    """Any of the others."""
    return int(FUNCTIONS[options.command](options))


def _hand_in(options: argparse.Namespace, submission: Submission) -> None:
    print(submission.show())
    if options.dry_run:
        for job in submission.jobs:
            print(f"\n==> {job.name}.sbatch\n{submission.script(job)}", end="")
        return
    if options.test_only:
        for name, said in submission.start_times().items():
            print(f"{name:<10}{said}")
        return
    if not submission.jobs:
        return
    ids = submission.submit()
    print("submitted " + ", ".join(f"{name} {number}" for name, number in ids.items()))
    print(f"watch it: pocl status {shlex.quote(str(submission.path))} --watch")


def _runs(options: argparse.Namespace) -> list[RunDirectory]:
    """The run directory that was named, or the submitted ones right below it."""
    from pocl_ds.errors import ArtifactError
    from pocl_ds.workflow.run_dir import RunDirectory

    path = options.run.resolve()
    if not path.is_dir():
        raise ArtifactError(f"{options.run} is no run directory: check the path")
    below = sorted(file.parents[1] for file in path.glob("*/cluster/submission.json"))
    return [
        RunDirectory(found)
        for found in (below if below and not (path / "cluster").is_dir() else [path])
    ]


def _watch(options: argparse.Namespace) -> int:
    from pocl_ds.cluster.watch import watch
    from pocl_ds.workflow.run_dir import RunDirectory

    watch(
        RunDirectory(options.run),
        interval=REFRESH / 2,
        once=options.once or not sys.stdout.isatty(),
    )
    return 0


def _status(options: argparse.Namespace) -> int:
    from pocl_ds.cluster.status import status, table

    runs = _runs(options)
    while True:
        found = [(run, status(run)) for run in runs]
        if options.watch and sys.stdout.isatty():
            print("\x1b[H\x1b[J", end="")
        print(
            "\n\n".join(
                (f"{run.path.name}\n" if len(runs) > 1 else "") + table(rows) for run, rows in found
            ),
            flush=True,
        )
        if not (options.watch and any(row.live for _, rows in found for row in rows)):
            return 0
        time.sleep(REFRESH)


def _cancel(options: argparse.Namespace) -> int:
    from pocl_ds.cluster.submit import cancel

    ids = [number for run in _runs(options) for number in cancel(run)]
    print(
        f"cancelled {', '.join(ids)}; `pocl resume {options.run}` goes on"
        if ids
        else "nothing waits or runs"
    )
    return 0


def _resume(options: argparse.Namespace) -> int:
    from pocl_ds.cluster.submit import resume

    for submission in [resume(run) for run in _runs(options)]:
        _hand_in(options, submission)
    return 0


def _logs(options: argparse.Namespace) -> int:
    from pocl_ds.errors import ArtifactError

    folder = _runs(options)[0].logs
    name = options.job or "*"
    pattern = f"{name}*-rank-{options.rank}.log" if options.rank is not None else f"{name}-*.log"
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if options.rank is None:
        found = [path for path in found if "-rank-" not in path.name]
    if not found:
        raise ArtifactError(
            f"there is no log {folder}/{pattern} yet: see `pocl status {options.run}`"
        )
    print(f"==> {found[-1]}", flush=True)
    if options.follow:
        return subprocess.call(["tail", "-n", "+1", "-F", str(found[-1])])
    sys.stdout.write(found[-1].read_text(errors="replace"))
    return 0


def _profile(options: argparse.Namespace) -> int:
    from pocl_ds.cluster.detect import detect
    from pocl_ds.cluster.profile import dump_profile, load_profile
    from pocl_ds.errors import RecipeError

    if options.action == "show":
        if not options.name:
            raise RecipeError("name the profile to show, as in `pocl profile show gpu`")
        print(dump_profile(load_profile(options.name)), end="")
        return 0
    profile, remarks = detect(options.partition)
    print("\n".join(f"# {remark}" for remark in remarks))
    print(dump_profile(profile), end="")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from pocl_ds.cluster import checks

    findings = checks.here(options.run_dir)
    for finding in findings:
        print(f"{finding.state:<5}{finding.what:<15}{finding.said}")
    return 2 if any(finding.state == checks.FAIL for finding in findings) else 0


FUNCTIONS: dict[str, Any] = {
    "status": _status,
    "watch": _watch,
    "cancel": _cancel,
    "resume": _resume,
    "logs": _logs,
    "profile": _profile,
    "doctor": _doctor,
}
