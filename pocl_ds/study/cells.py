"""Studies: a base recipe, arms that change it, a grid over all arms, and seeds. Every combination
is a cell, which is one run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pocl_ds.config import Int, Recipe, Section, semantic_fields
from pocl_ds.config.base import FileName, Float, NonNegativeFloat
from pocl_ds.config.recipe_file import load_recipe, validation_message
from pocl_ds.config.yaml_io import read_yaml
from pocl_ds.curriculum.plan import mean_sample_visits
from pocl_ds.errors import RecipeError, did_you_mean
from pocl_ds.evaluation.answers import answer_settings
from pocl_ds.resources import STUDIES
from pocl_ds.workflow.steps import Step, enabled_steps

NOT_IN_FOLDER_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
Overrides = tuple[str, ...]


class PublishedResults(Section):
    """Results of others that stand beside those of a study."""

    source: str = Field(description="Where they are published.")
    deviation: Literal["evaluation_seeds", "trainings"] = Field(
        "evaluation_seeds",
        description="What the deviations are taken over: answers of one training with several "
        "seeds, or trainings. The study's own deviations beside them are taken over the same.",
    )
    note: str | None = Field(
        None, description="What limits the comparison; printed below the table."
    )
    values: dict[str, dict[str, tuple[Float, NonNegativeFloat | None]]] = Field(
        min_length=1,
        description="Group of runs (arm and labels, as in the table) -> benchmark -> mean and "
        "standard deviation, or `null` for a deviation that is not published.",
    )


class StudyConfig(Section):
    """A study's file."""

    name: FileName
    base: str = Field(description="Base recipe: a file, or the name of a shipped one.")
    overrides: Overrides = Field((), description="Dotted overrides of the base, for all cells.")
    arms: dict[str, Overrides] = Field(min_length=1, description="Arms: name -> dotted overrides.")
    grid: dict[str, dict[str, Overrides] | tuple[Any, ...]] = Field(
        default_factory=dict,
        description="Grid over every arm: field -> values, or name -> label -> dotted overrides.",
    )
    seeds: tuple[Int, ...] = Field((42,), min_length=1, description="Seeds of every cell.")
    compare: tuple[tuple[str, str], ...] = Field(
        (), description="Pairs of arms: is the first better than the second?"
    )
    measure: Literal["rouge_l", "exact_match", "correct"] = Field(
        "rouge_l",
        description="What the table shows and the pairs compare, in percent; `correct` needs "
        "benchmarks with `verify`.",
    )
    until: Literal["rank", "evaluate", "report"] = Field(
        "report",
        description="Last step of each run. With rank, nothing is trained, and the difficulty "
        "rankings of the students are compared.",
    )
    published: PublishedResults | None = Field(
        None, description="Published results of the same measure; `null` for none."
    )

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        for arm in itertools.chain.from_iterable(self.compare):
            if arm not in self.arms:
                raise ValueError(
                    f"compare names the arm {arm!r}, which is not among {', '.join(self.arms)}"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a value twice: name each seed once")
        if self.published and self.until == "rank":
            raise ValueError("published needs evaluated students: leave until=rank out")
        groups = list(self.groups)
        for group in self.published.values if self.published else ():
            if group not in groups:
                raise ValueError(
                    f"published.values has the group {group!r}, which no run is in: "
                    f"{did_you_mean(group, groups)}"
                )
        return self

    @property
    def groups(self) -> Iterator[str]:
        """Every arm at every point of the grid."""
        labels = [_labels(axis, values) for axis, values in self.grid.items()]
        for arm, *point in itertools.product(self.arms, *labels):
            yield group_label(arm, point)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    point: tuple[tuple[str, str], ...]  # (axis of the grid, label of this cell)
    seed: int
    recipe: Recipe
    until: str = "report"  # its last step

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that it runs."""
        return enabled_steps(self.recipe, self.until)

    @property
    def group(self) -> str:
        """Arm and labels without the seed: what repetitions have in common."""
        return group_label(self.arm, [label for _, label in self.point])

    @property
    def name(self) -> str:
        """The name of its folder."""
        return NOT_IN_FOLDER_NAMES.sub("-", f"{self.group}-seed{self.seed}").strip("-")


def group_label(arm: str, labels: Iterable[str]) -> str:
    """How tables name an arm at a point of the grid."""
    return ", ".join([arm, *labels])


def load_study(source: str) -> StudyConfig:
    """Read a study from a file or by the name of a shipped one. Raises RecipeError naming the first
    field at fault.
    """
    path = Path(source) if os.path.isfile(source) else STUDIES / f"{source}.yaml"
    if not os.path.isfile(path):
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise RecipeError(
            f"study {source!r} is neither a file nor a shipped study ({known}): check the name"
        )
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} has no fields: start from a shipped study in launch/studies/")
    try:
        return StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(validation_message(error, f"{path}: study field", StudyConfig)) from None


def expand_cells(study: StudyConfig, overrides: Overrides = ()) -> list[Cell]:
    """Every cell with its checked recipe, seed by seed. Raises RecipeError naming the cell whose
    recipe is at fault.
    """
    # The axes of the grid: (axis, label, overrides) of each value.
    axes = [
        [(axis, label, value_overrides) for label, value_overrides in _labels(axis, values).items()]
        for axis, values in study.grid.items()
    ]

    # One cell for each seed, point of the grid and arm. Later overrides win.
    cells: list[Cell] = []
    for seed, coordinates, (arm, arm_overrides) in itertools.product(
        study.seeds, itertools.product(*axes), study.arms.items()
    ):
        point = tuple((axis, label) for axis, label, _ in coordinates)
        point_overrides = [
            override for *_, value_overrides in coordinates for override in value_overrides
        ]
        try:
            recipe = load_recipe(
                study.base,
                [*study.overrides, *arm_overrides, *point_overrides, f"seed={seed}", *overrides],
            )
        except RecipeError as error:
            raise RecipeError(
                f"study {study.name}, arm {arm!r} at {dict(point)}: {error}"
            ) from None
        cells.append(Cell(arm, point, seed, recipe, study.until))

    # Cells need different folders and comparable evaluations.
    names = [cell.name for cell in cells]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(
            f"study {study.name}: two cells have the folder name {duplicate!r}: rename the arms or "
            "labels"
        )
    if study.until != "rank":
        _check_evaluations(study, cells)
    _check_published_benchmarks(study, cells, overrides)
    return cells


def _labels(axis: str, values: dict[str, Overrides] | tuple[Any, ...]) -> dict[str, Overrides]:
    """Label -> overrides of one axis of the grid."""
    if isinstance(values, dict):
        return values
    overrides = [f"{axis}={json.dumps(value)}" for value in values]
    return {
        value if isinstance(value, str) else override: (override,)
        for value, override in zip(values, overrides, strict=True)
    }


def _check_evaluations(study: StudyConfig, cells: list[Cell]) -> None:
    """Raise RecipeError if the cells do not evaluate their students in the same way, so that one
    table could not hold them, or not by the measure of the study.
    """
    name = study.name
    for benchmark, config in cells[0].recipe.evaluate.benchmarks.items():
        if study.measure == "correct" and config.verify is None:
            raise RecipeError(
                f"study {name}: measure=correct needs evaluate.benchmarks.{benchmark}.verify in "
                "its base recipe: set it, or leave the benchmark out"
            )
    evaluations = []
    for cell in cells:
        evaluate = cell.recipe.evaluate
        if "student" not in evaluate.models:
            raise RecipeError(
                f"study {name}: {cell.name!r} does not evaluate the student: add it to "
                "evaluate.models"
            )
        evaluations.append(
            [
                answer_settings(cell.recipe.prompt, evaluate),
                cell.recipe.score.rouge_tokenizer,
                {**semantic_fields(evaluate), "models": None},
            ]
        )
    for cell, evaluation in zip(cells, evaluations, strict=True):
        if evaluation != evaluations[0]:
            raise RecipeError(
                f"study {name}: {cells[0].name!r} and {cell.name!r} are evaluated in different "
                "ways, so they cannot be compared: let no arm change evaluate or the prompt "
                "template"
            )


def _check_published_benchmarks(
    study: StudyConfig, cells: list[Cell], overrides: Overrides
) -> None:
    """Raise RecipeError if published values are of a benchmark that the study does not evaluate;
    overrides may leave out some of its benchmarks.
    """
    if study.published is None or any(o.startswith("evaluate.benchmarks") for o in overrides):
        return
    evaluated = cells[0].recipe.evaluate.benchmarks
    for group, values in study.published.values.items():
        for benchmark in values:
            if benchmark not in evaluated:
                raise RecipeError(
                    f"study {study.name}: published.values of {group!r} has the benchmark "
                    f"{benchmark!r}, which is not evaluated: {did_you_mean(benchmark, evaluated)}"
                )


def sample_visits(recipe: Recipe) -> float:
    """How often a run visits a sample on average. Arms that are compared must agree in it."""
    return mean_sample_visits(
        recipe.curriculum.num_subsets,
        recipe.curriculum.epochs_per_stage,
        recipe.curriculum.scheduler,
    )
