"""Commands before a submission: fetch, estimate, doctor and profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocl_ds.cli.cluster import PANEL
from pocl_ds.cli.parameters import (
    OverridesArgument,
    RecipeArgument,
    RunDirOption,
    add_panel,
    complete_profile,
    join_words,
    read_recipe,
)
from pocl_ds.cli.tables import print_table

if TYPE_CHECKING:
    from pocl_ds.config import Recipe
    from pocl_ds.models.estimate import ClusterLayout


def add_commands(app: typer.Typer) -> None:
    """Register the commands, in the panel of the cluster."""
    commands = (
        ("fetch", fetch, "pocl fetch my.yaml"),
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


def fetch(recipe: RecipeArgument = None, overrides: OverridesArgument = None) -> int:
    """Download the models, data and benchmarks of a recipe, for nodes without a network."""
    from huggingface_hub.constants import HF_HOME

    from pocl_ds.cluster.fetch import fetch_inputs
    from pocl_ds.runtime.formatting import format_size
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    resolved, _ = read_recipe(join_words(recipe, overrides), None)
    rows = [["field", "name", "size", "where"]]
    sizes: dict[str, int] = {}
    for item in fetch_inputs(resolved):
        size = "-" if item.bytes is None else format_size(item.bytes)
        rows.append([item.field, item.name, size, item.path])
        sizes[item.path] = item.bytes or 0
    print_table(rows)
    total = format_size(sum(sizes.values()))
    print(f"{total}, without the cache of datasets; in the profile of the cluster set")
    print(f'environment: {{HF_HOME: {HF_HOME}, HF_HUB_OFFLINE: "1"}}')
    return 0


def profile_detect(
    partition: Annotated[
        str | None,
        typer.Option(
            help="Describe this partition. Default: the one with GPUs.", show_default=False
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Describe nodes with GPUs of this type, as SLURM names it.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Write a first profile of this cluster to standard output."""
    from pocl_ds.cluster.profile_detection import commented_profile, detect_profile

    profile, remarks = detect_profile(partition, gpu)
    print("\n".join(f"# {remark}" for remark in remarks))
    print(commented_profile(profile), end="")
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
