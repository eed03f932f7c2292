"""A study's file: a base recipe, arms that change it, a grid over all arms, and seeds. Every
combination is a cell, a run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pocl_ds.config import Int, Recipe, Section, semantic_fields
from pocl_ds.config.recipe_file import validation_message, load_recipe
from pocl_ds.config.yaml_io import read_yaml
from pocl_ds.curriculum.plan import mean_sample_visits
from pocl_ds.errors import RecipeError
from pocl_ds.evaluation.answers import settings
from pocl_ds.resources import STUDIES
from pocl_ds.workflow.steps import Step, enabled_steps

UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


class StudyConfig(Section):
    """What a study's file says."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: str = Field(description="a recipe's file, or the name of a shipped one")
    overrides: tuple[str, ...] = Field(
        (), description="dotted overrides of the base, for all cells"
    )
    arms: dict[str, tuple[str, ...]] = Field(min_length=1, description="name -> dotted overrides")
    grid: dict[str, dict[str, tuple[str, ...]] | tuple[Any, ...]] = Field(
        default_factory=dict,
        description="field -> values, or name -> label -> dotted overrides; each with every arm",
    )
    seeds: tuple[Int, ...] = Field((42,), min_length=1, description="each cell once with each")
    compare: tuple[tuple[str, str], ...] = Field(
        (), description="pairs of arms: is the first better than the second?"
    )
    until: Literal["rank", "evaluate", "report"] = Field(
        "report",
        description="last stage of each run; rank: students' difficulty is compared, and nothing "
        "trained",
    )

    @model_validator(mode="after")
    def _arms_are_there(self) -> StudyConfig:
        for arm in itertools.chain.from_iterable(self.compare):
            if arm not in self.arms:
                raise ValueError(
                    f"compare names the arm {arm!r}, which is not among {', '.join(self.arms)}"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands there twice: name each once")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    point: tuple[tuple[str, str], ...]  # names of the grid and this cell's label of each
    seed: int
    recipe: Recipe
    until: str = "report"  # its last stage

    @property
    def stages(self) -> tuple[Step, ...]:
        """What it runs."""
        return enabled_steps(self.recipe, self.until)

    @property
    def group(self) -> str:
        """Arm and point, without the seed: what repetitions have in common."""
        return ", ".join([self.arm, *(label for _, label in self.point)])

    @property
    def name(self) -> str:
        """A folder's name."""
        return UNFIT.sub("-", f"{self.group}-seed{self.seed}").strip("-")


def load_study(source: str) -> StudyConfig:
    """A study's file, or a shipped one's name. Raises RecipeError naming the first field at fault."""
    path = Path(source) if os.path.isfile(source) else STUDIES / f"{source}.yaml"
    if not os.path.isfile(path):
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise RecipeError(
            f"study {source!r} is neither a file nor a shipped study ({known}): check the name"
        )
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no fields: start from a shipped study in launch/studies/")
    try:
        return StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(validation_message(error, f"{path}: study field", StudyConfig)) from None


def cells_of(study: StudyConfig, overrides: tuple[str, ...] = ()) -> list[Cell]:
    """Every cell with its checked recipe, seed by seed. Raises RecipeError naming the cell whose
    recipe is at fault.
    """
    axes = [
        [(name, label, words) for label, words in _labels(name, values).items()]
        for name, values in study.grid.items()
    ]
    found: list[Cell] = []
    for seed, along, (arm, changes) in itertools.product(
        study.seeds, itertools.product(*axes), study.arms.items()
    ):
        point = tuple((name, label) for name, label, _ in along)
        words = [word for *_, change in along for word in change]
        try:
            recipe = load_recipe(
                study.base, [*study.overrides, *changes, *words, f"seed={seed}", *overrides]
            )
        except RecipeError as error:
            raise RecipeError(
                f"study {study.name}, arm {arm!r} at {dict(point)}: {error}"
            ) from None
        found.append(Cell(arm, point, seed, recipe, study.until))
    names = [cell.name for cell in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(
            f"study {study.name}: two cells would be called {twice!r}: give the arms other names"
        )
    if study.until != "rank":
        _check_evaluations(study.name, found)
    return found


def _check_evaluations(name: str, cells: list[Cell]) -> None:
    """Raise RecipeError where cells could not be put into one table: their students must have been
    asked alike.
    """
    asked = []
    for cell in cells:
        evaluate = cell.recipe.evaluate
        if "student" not in evaluate.models:
            raise RecipeError(
                f"study {name}: {cell.name!r} does not evaluate the student: name it in "
                f"evaluate.models"
            )
        asked.append(
            [settings(cell.recipe.prompt, evaluate), {**semantic_fields(evaluate), "models": None}]
        )
    if other := next((number for number, one in enumerate(asked) if one != asked[0]), None):
        raise RecipeError(
            f"study {name}: {cells[0].name!r} and {cells[other].name!r} are evaluated in "
            f"different ways, so they "
            "cannot be compared: let no arm change evaluate, nor the template of prompts"
        )


def sample_visits(recipe: Recipe) -> float:
    """How often a sample is seen in a whole run, on average: what arms must have in common to be
    compared.
    """
    return mean_sample_visits(
        recipe.curriculum.num_subsets,
        recipe.curriculum.epochs_per_stage,
        recipe.curriculum.scheduler,
    )


def _labels(
    name: str, values: dict[str, tuple[str, ...]] | tuple[Any, ...]
) -> dict[str, tuple[str, ...]]:
    """Label -> overrides of one axis of the grid."""
    if isinstance(values, dict):
        return values
    words = [f"{name}={json.dumps(value)}" for value in values]
    return {
        value if isinstance(value, str) else word: (word,)
        for value, word in zip(values, words, strict=True)
    }
