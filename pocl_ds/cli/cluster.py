"""Commands of a cluster: submit, status, watch, cancel, resume, logs, profile, doctor, estimate."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocl_ds.cli.parameters import (
    ExistingRunDirOption,
    OverridesArgument,
    RecipeArgument,
    RunDirOption,
    add_panel,
    complete_profile,
    complete_recipe,
    existing_run,
    join_words,
    read_recipe,
    read_recipes,
)
from pocl_ds.cli.tables import print_table

if TYPE_CHECKING:
    from pocl_ds.cluster.status import Row
    from pocl_ds.cluster.submit import Submission
    from pocl_ds.config import Recipe
    from pocl_ds.models.estimate import ClusterLayout
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
        ("watch", watch, "pocl watch --run-dir runs/x"),
        ("cancel", cancel, "pocl cancel --run-dir runs/x"),
        ("resume", resume, "pocl resume --run-dir runs/x"),
        ("logs", logs, "pocl logs --run-dir runs/x train --rank 1 --follow"),
        ("doctor", doctor, "pocl doctor --run-dir runs/x"),
        ("estimate", estimate, "pocl estimate my.yaml --nodes 4 --gpu a100-40g"),
    )
    add_panel(app, PANEL, commands)

    profiles = typer.Typer(help="Write a profile of this cluster, or show one.")
    profile_commands = (
        ("detect", profile_detect, "pocl profile detect > my-cluster.yaml"),
        ("show", profile_show, "pocl profile show gpu"),
    )
    add_panel(profiles, None, profile_commands)
    app.add_typer(profiles, name="profile", rich_help_panel=PANEL)


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
    dry_run: ScriptsOption = False,
    test_only: TestOnlyOption = False,
) -> int:
    """Submit a run to SLURM as dependent jobs."""
    from pocl_ds.cluster.profile import load_profile
    from pocl_ds.cluster.submit import Submission
    from pocl_ds.errors import RecipeError
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    recipes = read_recipes(words or [], run_dir)
    if nodes is not None and nodes < 1:
        raise RecipeError(f"--nodes {nodes}: it must be at least 1")
    # Check every submission before the first one is submitted.
    cluster = load_profile(profile)
    for submission in [Submission(run, recipe, cluster, nodes=nodes) for recipe, run in recipes]:
        _submit(submission, dry_run=dry_run, test_only=test_only)
    return 0


def _submit(submission: Submission, *, dry_run: bool, test_only: bool) -> None:
    """Print the jobs of a submission and submit them."""
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
) -> int:
    """Show the jobs of a submitted run, their progress, and the error that stopped one."""
    from pocl_ds.cluster.status import Row
    from pocl_ds.cluster.status import status as job_rows

    runs = _submitted_runs(run_dir)
    header = Row("job", "id", "state", "attempt", "progress")
    while True:
        tables = [(run, job_rows(run)) for run in runs]
        if watch and sys.stdout.isatty():
            print("\x1b[H\x1b[J", end="")
        for number, (run, rows) in enumerate(tables):
            if len(runs) > 1:
                print(("\n" if number else "") + run.path.name)
            print_table([[r.name, r.ids, r.state, r.attempt, r.progress] for r in (header, *rows)])
            _print_notes(rows)
        sys.stdout.flush()
        if not (watch and any(row.live for _, rows in tables for row in rows)):
            return 0
        time.sleep(REFRESH_SECONDS)


def _print_notes(rows: list[Row]) -> None:
    """Print the notes of each job below the table."""
    for row in rows:
        for number, note in enumerate(row.notes):
            print(f"\n{row.name}: {note}" if number == 0 else f"    {note}")


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
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show new lines as they are written.")
    ] = False,
) -> int:
    """Show the newest log of a job or of one of its ranks."""
    from pocl_ds.errors import ArtifactError

    folder = _submitted_runs(run_dir)[0].logs
    pattern = f"{job or '*'}*-rank-{rank}.log" if rank is not None else f"{job or '*'}-*.log"
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


def profile_detect(
    partition: Annotated[
        str | None,
        typer.Option(
            help="Describe this partition. Default: the one with GPUs.", show_default=False
        ),
    ] = None,
) -> int:
    """Write a first profile of this cluster to standard output."""
    from pocl_ds.cluster.profile import dump_profile
    from pocl_ds.cluster.profile_detection import detect_profile

    profile, remarks = detect_profile(partition)
    print("\n".join(f"# {remark}" for remark in remarks))
    print(dump_profile(profile), end="")
    return 0


def profile_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Show this profile: a file or a name.",
            autocompletion=complete_profile,
        ),
    ],
) -> int:
    """Show a profile with its defaults filled in."""
    from pocl_ds.cluster.profile import dump_profile, load_profile

    print(dump_profile(load_profile(name)), end="")
    return 0


def doctor(
    run_dir: Annotated[
        Path,
        typer.Option("--run-dir", metavar="DIR", help="Check the disk of this run directory."),
    ] = Path("runs"),
) -> int:
    """Check this machine before a run: packages, GPUs, compiler, disk, limits, scheduler."""
    from pocl_ds.cluster import machine_checks

    findings = machine_checks.check_machine(run_dir)
    rows = [[finding.state, finding.check, finding.message] for finding in findings]
    print_table([["state", "check", "finding"], *rows])
    return 2 if any(finding.state == machine_checks.FAIL for finding in findings) else 0


def estimate(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    run_dir: RunDirOption = None,
    nodes: Annotated[int, typer.Option(help="Assume this many nodes.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(help="Assume this many GPUs per node, one rank each.")
    ] = 8,
    gpu: Annotated[
        str, typer.Option(help="Assume this GPU, for example a100-80g, a100-40g or l40s-48g.")
    ] = "h100-80g",
    network_gbps: Annotated[
        float, typer.Option(help="Assume this network bandwidth of a node, in Gbit/s.")
    ] = 400,
    samples: Annotated[
        int | None,
        typer.Option(help="Assume this many training samples. Default: 11,435, as in the paper."),
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(help="Assume this mean number of tokens in a prompt.")
    ] = None,
    response_tokens: Annotated[
        float | None, typer.Option(help="Assume this mean number of tokens in a response.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(help="Assume that arithmetic reaches this share of the GPU's peak.")
    ] = 0.4,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the recipe with the values that fit."),
    ] = None,
) -> int:
    """Estimate memory, traffic and hours of a run; exit with 2 if it does not fit."""
    from pocl_ds.models.estimate import ClusterLayout
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    resolved, _ = read_recipe(join_words(recipe, overrides), run_dir)
    options = {
        "samples": samples,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "utilization": utilization,
    }
    assumptions = {name: value for name, value in options.items() if value is not None}
    _check_positive(
        nodes=nodes, gpus_per_node=gpus_per_node, network_gbps=network_gbps, **assumptions
    )
    layout = ClusterLayout(nodes, gpus_per_node, network_gbps / 8 * 1e9)
    return _print_estimate(resolved, layout, gpu, assumptions, write)


def _print_estimate(
    recipe: Recipe, layout: ClusterLayout, gpu: str, assumptions: dict[str, Any], file: Path | None
) -> int:
    """Print an estimate, and write the recipe with the values that fit to `file`. Returns the exit
    code: 2 if nothing fits.
    """
    from pocl_ds.cluster.estimate_page import estimate_lines, fitting_overrides
    from pocl_ds.cluster.recipe_estimate import Assumptions, Estimate, device_by_name
    from pocl_ds.config.recipe_file import dump_recipe, override_recipe
    from pocl_ds.workflow.files import atomic_write

    estimate = Estimate(recipe, Assumptions(layout, device_by_name(gpu), **assumptions))
    lines, fitting = estimate_lines(estimate)
    print("\n".join(lines))
    if fitting is None:
        return 2
    if file:
        fitting_recipe = override_recipe(recipe, fitting_overrides(estimate, fitting))
        with atomic_write(file) as stream:
            stream.write(dump_recipe(fitting_recipe))
        print(f"written: {file}")
    return 0


def _check_positive(**values: float) -> None:
    """Raise RecipeError for a value of an option that is not greater than 0."""
    from pocl_ds.errors import RecipeError

    for name, value in values.items():
        if not value > 0:
            raise RecipeError(f"--{name.replace('_', '-')} {value:g}: it must be greater than 0")


def _submitted_runs(folder: Path) -> list[RunDirectory]:
    """The run directory `folder`, or the submitted ones directly below it."""
    from pocl_ds.workflow.run_dir import RunDirectory

    path = existing_run(folder).path.resolve()
    submitted = sorted(file.parents[1] for file in path.glob("*/cluster/submission.json"))
    is_run = (path / "cluster").is_dir() or not submitted
    return [RunDirectory(run) for run in ([path] if is_run else submitted)]
