"""Which steps of a run are finished."""

from __future__ import annotations

from collections.abc import Mapping

from pocl_ds.config import Recipe
from pocl_ds.difficulty.shards import fingerprint_of_finished_scores, unfinished_shards
from pocl_ds.workflow.manifest import finished_manifest, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEP, STEPS, Step, fingerprints


def finished_steps(
    run: RunDirectory,
    recipe: Recipe,
    *,
    checksums: bool = False,
    expected: Mapping[str, str] | None = None,
) -> dict[str, bool]:
    """Whether each step has a complete result of this recipe.

    A step that describes a training counts as finished only if the training is finished too.
    checksums: also whether each file is undamaged, before its result is used. expected: the
    recipe's fingerprints, where the caller has them.
    """
    expected, finished = expected or fingerprints(recipe), dict[str, bool]()
    for step in STEPS:
        if step.name == "score":
            finished["score"] = run.scores.is_dir() and not unfinished_shards(
                run, recipe.score, expected["score"], checksums=checksums
            )
            continue
        upstream = not step.describes_training or all(
            finished[name] for name in step.dependencies_of(recipe) if STEP[name].enabled(recipe)
        )
        manifest = upstream and finished_manifest(
            step.directory(run), expected[step.name], checksums=checksums
        )
        finished[step.name] = bool(manifest)
    return finished


def finished_fingerprint(step: Step, run: RunDirectory) -> str | None:
    """The fingerprint of a step's finished result, even if it belongs to another recipe; None for
    an unfinished step.
    """
    if step.name == "score":
        return fingerprint_of_finished_scores(run)
    manifest = read_manifest(step.directory(run))
    return None if manifest is None else manifest.fingerprint
