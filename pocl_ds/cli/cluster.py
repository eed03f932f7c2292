"""Commands of submitted runs: submit, status, list, watch, cancel, resume, logs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pocl_ds.cli.parameters import (
    ExistingRunDirOption,
    RunDirOption,
    add_panel,
    complete_profile,
    complete_recipe,
    complete_step,
    existing_run,
    read_recipes,
)
from pocl_ds.cli.tables import print_table
from pocl_ds.workflow.steps import STEP_NAMES, check_step_names

if TYPE_CHECKING:
    from pocl_ds.cluster.status import Row
    from pocl_ds.cluster.submit import Submission
    from pocl_ds.workflow.run_dir import RunDirectory

PANEL = "Cluster"
REFRESH_SECONDS = 5.0

TestOnlyOption = Annotated[
    bool, typer.Option("--test-only", help="Ask the scheduler when the jobs would start.")
]
ScriptsOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the jobs and their scripts; submit nothing.")
]
SubmittedRunOption = Annotated[
    Path,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Use this submitted run, or all submitted runs directly below this folder.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this panel."""
    commands = (
        ("submit", submit, "pocl submit my.yaml --profile gpu --nodes 4 --run-dir runs/x"),
        ("status", status, "pocl status --run-dir runs/x --watch"),
        ("list", list_runs, "pocl list runs"),
        ("watch", watch, "pocl watch --run-dir runs/x"),
        ("cancel", cancel, "pocl cancel --run-dir runs/x"),
        ("resume", resume, "pocl resume --run-dir runs/x"),
        ("logs", logs, "pocl logs --run-dir runs/x train --rank 1 --follow"),
    )
    add_panel(app, PANEL, commands)


def submit(
    profile: Annotated[
        str,
        typer.Option(
            metavar="PROFILE",
            help="Use this cluster profile: a file, or a name in slurm/profiles/ or "
            "~/.config/pocl/profiles/.",
            autocompletion=complete_profile,
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|FIELD=VALUE",
            help="Submit these recipes (files or shipped names), with these overrides. Each of "
            "several recipes gets its own run directory below --run-dir.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    run_dir: RunDirOption = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            help="Train on this many nodes. Default: as many as launch.ranks fills.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="STEP",
            help="Submit no step before this one; those must be finished.",
            autocompletion=complete_step,
        ),
    ] = STEP_NAMES[0],
    until: Annotated[
        str,
        typer.Option(
            metavar="STEP",
            help="Submit no step after this one; neither does `pocl resume`.",
            autocompletion=complete_step,
        ),
    ] = STEP_NAMES[-1],
    target: Annotated[
        Literal["slurm", "kubernetes"],
        typer.Option(
            help="Submit to SLURM, or print a JobSet and a ConfigMap for `kubectl apply -f -` with "
            "--dry-run."
        ),
    ] = "slurm",
    dry_run: ScriptsOption = False,
    test_only: TestOnlyOption = False,
) -> int:
    """Submit a run to SLURM as dependent jobs, or print it for Kubernetes."""
    from pocl_ds.cluster.profile import load_profile
    from pocl_ds.cluster.submit import Submission
    from pocl_ds.errors import RecipeError
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    check_step_names({"--from": start, "--until": until})
    recipes = read_recipes(words or [], run_dir)
    if nodes is not None and nodes < 1:
        raise RecipeError(f"--nodes {nodes}: it must be at least 1")
    # Check every submission before the first one is submitted.
    cluster = load_profile(profile)
    submissions = [
        Submission(run, recipe, cluster, nodes=nodes, start=start, until=until)
        for recipe, run in recipes
    ]
    if target == "kubernetes":
        return _print_manifests(submissions, dry_run=dry_run)
    for submission in submissions:
        _submit(submission, dry_run=dry_run, test_only=test_only)
    return 0


def _print_manifests(submissions: list[Submission], *, dry_run: bool) -> int:
    """Print the manifests of some runs for Kubernetes."""
    from pocl_ds.cluster.kubernetes import manifest
    from pocl_ds.errors import RecipeError

    if not dry_run:
        raise RecipeError(
            "--target kubernetes only prints a manifest: add --dry-run, and pass the output to "
            "`kubectl apply -f -`"
        )
    print("---\n".join(filter(None, map(manifest, submissions))), end="")
    return 0


def _submit(submission: Submission, *, dry_run: bool, test_only: bool) -> None:
    """Check a submission, print its jobs, and submit them."""
    from pocl_ds.cluster.submit_checks import check_submission

    check_submission(submission)
    print(submission.show())
    if dry_run:
        for job in submission.jobs:
            print(f"\n==> {job.name}.sbatch\n{submission.script(job)}", end="")
        return
    if test_only:
        print_table([["job", "start"], *map(list, submission.start_times().items())])
        return
    if not submission.jobs:
        return
    ids = submission.submit()
    print("submitted " + ", ".join(f"{name} {job_id}" for name, job_id in ids.items()))
    print(f"watch it: pocl status --run-dir {shlex.quote(str(submission.path))} --watch")


def status(
    run_dir: SubmittedRunOption,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help=f"Repeat every {REFRESH_SECONDS:.0f} s until no job waits or runs."
        ),
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Wait until no job waits or runs; exit with 0 if everything is done, else with 1.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per run, for scripts.")
    ] = False,
) -> int:
    """Show the jobs of a submitted run, their progress, and the error that stopped one."""
    from pocl_ds.cluster.status import state_of_run
    from pocl_ds.cluster.status import status as job_rows

    runs = _submitted_runs(run_dir)
    while True:
        tables = [(run, job_rows(run)) for run in runs]
        live = any(state_of_run(rows) == "live" for _, rows in tables)
        if watch or not (wait and live):
            if watch and sys.stdout.isatty():
                print("\x1b[H\x1b[J", end="")
            for number, (run, rows) in enumerate(tables):
                if as_json:
                    tree = {"run": str(run.path), "state": state_of_run(rows)}
                    print(json.dumps({**tree, "jobs": [asdict(row) for row in rows]}))
                    continue
                if len(runs) > 1:
                    print(("\n" if number else "") + run.path.name)
                _print_rows(rows)
            sys.stdout.flush()
        if not (live and (watch or wait)):
            done = all(state_of_run(rows) == "done" for _, rows in tables)
            return 0 if done or not wait else 1
        time.sleep(REFRESH_SECONDS)


def _print_rows(rows: list[Row]) -> None:
    """Print the jobs of a run as a table, with their notes below."""
    table = [["job", "id", "state", "attempt", "GPU hours", "progress"]]
    for row in rows:
        hours = "-" if row.gpu_hours is None else f"{row.gpu_hours:.1f}"
        table.append([row.name, row.ids, row.state, row.attempt, hours, row.progress])
    print_table(table)
    _print_notes(rows)


def _print_notes(rows: list[Row]) -> None:
    """Print the notes of each job below the table."""
    for row in rows:
        for number, note in enumerate(row.notes):
            print(f"\n{row.name}: {note}" if number == 0 else f"    {note}")


def list_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="List the runs at and below this folder.")
    ] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per run, for scripts.")
    ] = False,
) -> int:
    """List runs with their finished steps and their jobs, the newest first."""
    from pocl_ds.cluster import run_list
    from pocl_ds.errors import ArtifactError

    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: name one that has runs")
    runs = run_list.list_runs(folder)
    if as_json:
        for run in runs:
            print(json.dumps({**asdict(run), "state": run.state}))
        return 0
    table = [["run", "recipe", "state", "steps", "next", "jobs", "changed"]]
    for run in runs:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        jobs = ", ".join(run.jobs) or "-"
        steps = f"{run.finished}/{run.steps}"
        table.append([run.path, run.recipe, run.state, steps, run.next_step or "-", jobs, changed])
    print_table(table)
    return 0


def watch(
    run_dir: ExistingRunDirOption,
    once: Annotated[
        bool,
        typer.Option("--once", help="Show the run once, as if the output were not a terminal."),
    ] = False,
) -> int:
    """Show a run live in the terminal, from the files in its directory."""
    from pocl_ds.cluster.watch import watch as watch_run
    from pocl_ds.workflow.run_dir import RunDirectory

    interval = REFRESH_SECONDS / 2
    watch_run(RunDirectory(run_dir), interval=interval, once=once or not sys.stdout.isatty())
    return 0


def cancel(run_dir: SubmittedRunOption) -> int:
    """Cancel the jobs of a submitted run and keep its finished steps."""
    from pocl_ds.cluster.submit import cancel as cancel_jobs

    ids = [job_id for run in _submitted_runs(run_dir) for job_id in cancel_jobs(run)]
    if ids:
        print(f"cancelled {', '.join(ids)}; continue with `pocl resume --run-dir {run_dir}`")
    else:
        print("no job waits or runs")
    return 0


def resume(
    run_dir: SubmittedRunOption, dry_run: ScriptsOption = False, test_only: TestOnlyOption = False
) -> int:
    """Submit the unfinished steps of a run again."""
    from pocl_ds.cluster.submit import resume as resume_run

    for submission in [resume_run(run) for run in _submitted_runs(run_dir)]:
        _submit(submission, dry_run=dry_run, test_only=test_only)
    return 0


def logs(
    run_dir: SubmittedRunOption,
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB", help="Show this job. Default: the newest log.", show_default=False
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Show the log of this rank. Default: of the job.", show_default=False),
    ] = None,
    task: Annotated[
        int | None,
        typer.Option(help="Show the log of this task of a job array.", show_default=False),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show new lines as they are written.")
    ] = False,
) -> int:
    """Show the newest log of a job, of a task of a job array, or of one of its ranks."""
    from pocl_ds.errors import ArtifactError, RecipeError

    if task is not None and job is None:
        raise RecipeError(f"--task {task}: name its job array too, as in `pocl logs score`")
    folder = _submitted_runs(run_dir)[0].logs
    label = job or "*"
    if rank is not None:
        pattern = f"{label}{'*' if task is None else f'-{task}-a*'}-rank-{rank}.log"
    else:
        pattern = f"{label}-*{'' if task is None else f'_{task}'}.log"
    files = [file for file in folder.glob(pattern) if rank is not None or "-rank-" not in file.name]
    if not files:
        raise ArtifactError(
            f"there is no log {folder}/{pattern} yet: see `pocl status --run-dir {run_dir}`"
        )
    newest = max(files, key=lambda file: file.stat().st_mtime)
    print(f"==> {newest}", flush=True)
    if follow:
        return subprocess.call(["tail", "-n", "+1", "-F", str(newest)])
    sys.stdout.write(newest.read_text(errors="replace"))
    return 0


def _submitted_runs(folder: Path) -> list[RunDirectory]:
    """The run directory `folder`, or the submitted ones directly below it."""
    from pocl_ds.workflow.run_dir import RunDirectory

    path = existing_run(folder).path.resolve()
    submitted = sorted(file.parents[1] for file in path.glob("*/cluster/submission.json"))
    is_run = (path / "cluster").is_dir() or not submitted
    return [RunDirectory(run) for run in ([path] if is_run else submitted)]
