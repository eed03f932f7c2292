"""A recipe on disk: a YAML file or a shipped name, dotted overrides, and one sentence for what is
wrong in it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import reprlib
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pocl_ds.config import Recipe
from pocl_ds.config.yaml_io import dump_yaml, plain_value, read_yaml
from pocl_ds.config.yaml_io import fault as yaml_fault
from pocl_ds.errors import PoclError, RecipeError
from pocl_ds.resources import RECIPES
from pocl_ds.runtime.credentials import find_secret


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply dotted overrides.

    source: a YAML file or the name of a shipped recipe. overrides: `section.field=value`, the value
    in YAML. Raises RecipeError, one sentence with field, value and remedy.
    """
    tree = _read_tree(recipe_path(source))
    for override in overrides or []:
        _apply_override(tree, override)
    return check_recipe(tree)


def override_recipe(recipe: Recipe, overrides: list[str]) -> Recipe:
    """A recipe with dotted overrides applied. Raises RecipeError as `load_recipe`."""
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        _apply_override(tree, override)
    return check_recipe(tree)


def recipe_path(source: str) -> Path:
    """The file a recipe's name or path stands for."""
    path = Path(source)
    if os.path.isfile(path):  # Path.is_file raises for a name that is too long
        return path
    shipped = RECIPES / f"{source}.yaml"
    if os.sep not in source and os.path.isfile(shipped):
        return shipped
    if os.path.isdir(path):
        raise RecipeError(
            f"recipe {source} is a folder: name a file in it, or a run directory with --run-dir"
        )
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise RecipeError(
        f"recipe {source!r} is neither a file nor a shipped recipe ({names}): check the name"
    )


def check_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a tree of plain values, after its plugins were imported. Raises RecipeError naming
    the first field at fault.
    """
    if field := find_secret(tree):  # before any check, whose message might show it
        raise RecipeError(
            f"recipe field {field} holds a password, a token or a key, and recipes are written "
            f"down: remove it, "
            "and export it as a variable (HF_TOKEN, WANDB_API_KEY, the one of "
            "evaluate.judge.api_key_env)"
        )
    _import_plugins(tree.get("plugins"))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(first_fault(error, "recipe field", Recipe)) from None


def _import_plugins(names: Any) -> None:
    """Import the modules of `plugins`, which register what the recipe may name."""
    if not isinstance(names, (list, tuple)):
        return  # the recipe's own check says what is wrong with it
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    for name in names:
        try:
            importlib.import_module(str(name))
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"recipe field plugins: module {name} cannot be imported ({error}): put its "
                f"folder into PYTHONPATH"
            ) from None
        except PoclError:
            raise
        except Exception as error:  # the module is the user's, and may do anything
            raise RecipeError(
                f"recipe field plugins: module {name!r} cannot be imported "
                f"({type(error).__name__}: {error}): mend it"
            ) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read_tree(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no sections: start from a shipped recipe in {RECIPES}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"override {_shown(override)} is not of the form section.field=value")
    try:
        value = plain_value(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {_shown(override)}: the value is not valid YAML ({yaml_fault(error)}): "
            f"quote it"
        ) from None
    node = tree
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(
                f"override {_shown(override)}: {'.'.join(parents[: depth + 1])} is a value, not a "
                f"section"
            )
        node[parent] = dict(child)  # a YAML alias is one and the same mapping in several places
        node = node[parent]
    node[leaf] = value


def first_fault(error: ValidationError, what: str, model: type[BaseModel]) -> str:
    """The first fault of a tree as one sentence that begins with `what`; further ones are counted."""
    faults = sorted(
        error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden"
    )
    fault = faults[0]  # a misspelt field first: it explains the one that is missing
    field = ".".join(str(part) for part in fault["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    kind, message = fault["type"], fault["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{what} {field} does not exist{_suggestion(fault['loc'], model)}{more}"
    if kind == "missing":
        return f"{what} {field} is missing: add it{more}"
    if kind == "model_type":
        return (
            f"{what} {field}={_shown(fault['input'])} is a section: write its fields below it{more}"
        )
    if not field:
        return f"{what.removesuffix('field').rstrip(' :')}: {message}{more}"
    shown = "" if isinstance(fault["input"], dict) else f"={_shown(fault['input'])}"
    return f"{what} {field}{shown}: {message[:1].lower()}{message[1:]}{more}"


def _shown(value: Any) -> str:
    """A value as it stands in a sentence: not the whole of a long one, nor of one that holds
    another a thousand times.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    return short.repr(value)


def _suggestion(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    section: Any = model
    for part in location[:-1]:
        if part not in section.model_fields:  # a key of a table, as in jobs.train
            continue
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None
        )
        if section is None:
            return ": remove it"
    close = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    return (
        f": did you mean {close[0]}?"
        if close
        else f": the fields here are {', '.join(section.model_fields)}"
    )
