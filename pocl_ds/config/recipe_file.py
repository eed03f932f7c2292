"""Reading and writing recipes: YAML files and shipped names, dotted overrides, and one-sentence
error messages.
"""

from __future__ import annotations

import importlib
import os
import re
import reprlib
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pocl_ds.config.base import PATTERN_REMEDIES
from pocl_ds.config.recipe import Recipe
from pocl_ds.config.yaml_io import dump_yaml, parse_yaml, read_yaml, yaml_fault
from pocl_ds.errors import PoclError, RecipeError, did_you_mean, nearest_name
from pocl_ds.resources import RECIPES, shipped_names
from pocl_ds.runtime.credentials import find_secret


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    source: path of a YAML file, or name of a shipped recipe. overrides: `section.field=value`, with
    the value in YAML. Raises RecipeError.
    """
    tree = _read_tree(recipe_path(source))
    for override in overrides or []:
        _apply_override(tree, override)
    return check_recipe(tree)


def override_recipe(recipe: Recipe, overrides: list[str]) -> Recipe:
    """A copy of a recipe with overrides applied. Raises RecipeError, as `load_recipe` does."""
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        _apply_override(tree, override)
    return check_recipe(tree)


def recipe_path(source: str) -> Path:
    """The file of a recipe, from its path or its shipped name. Raises RecipeError."""
    path = Path(source)
    if os.path.isfile(path):  # Path.is_file raises for a name that is too long
        return path
    shipped = RECIPES / f"{source}.yaml"
    names = shipped_names(RECIPES)
    if source in names:
        return shipped
    if os.path.isdir(path):
        raise RecipeError(
            f"recipe {source} is a folder: name a file in it, or a run directory with --run-dir"
        )
    nearest = nearest_name(source, names)
    raise RecipeError(
        f"recipe {source!r} is neither a file nor a shipped recipe ({', '.join(names)}): "
        + (f"did you mean {nearest}?" if nearest else "check the name")
    )


def check_recipe(tree: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a tree of plain values, after importing its plugins.

    source: first word of the error messages. Raises RecipeError for the first wrong field.
    """
    # Look for secrets first: the message of another check could show them.
    if field := find_secret(tree):
        raise RecipeError(
            f"{source} field {field} contains a password, a token or a key, and recipes are "
            "written to disk: remove it, and export it as an environment variable (HF_TOKEN, "
            "WANDB_API_KEY, or one that an api_key_env names)"
        )
    _import_plugins(tree.get("plugins"), source)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(validation_message(error, f"{source} field", Recipe)) from None


def _import_plugins(names: Any, source: str) -> None:
    """Import the modules of `plugins`, which register the names that the recipe may use."""
    if not isinstance(names, (list, tuple)):
        return  # validation reports the wrong type
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    for name in names:
        try:
            importlib.import_module(str(name))
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"{source} field plugins: module {name} cannot be imported ({error}): add its "
                "folder to PYTHONPATH"
            ) from None
        except PoclError:
            raise
        except Exception as error:  # a user's module may raise anything
            raise RecipeError(
                f"{source} field plugins: module {name!r} cannot be imported "
                f"({type(error).__name__}: {error}): fix it"
            ) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with all its fields as YAML; `load_recipe` reads the same recipe back."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read_tree(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} has no sections: start from a shipped recipe in {RECIPES}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the field that `section.field=value` names."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"override {_shortened(override)} is not of the form section.field=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {_shortened(override)}: the value is not valid YAML ({yaml_fault(error)}): "
            "quote it"
        ) from None
    section = tree
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents, 1):
        # A number as a key, as in teacher.by_stage, is no text in YAML.
        parent = next((key for key in section if str(key) == parent), parent)
        child = section.get(parent)
        if not isinstance(child, (dict, type(None))):
            raise RecipeError(
                f"override {_shortened(override)}: {'.'.join(parents[:depth])} is a value, not a "
                "section"
            )
        # A copy: with a YAML alias, the same dictionary is in several sections.
        section[parent] = dict(child or {})
        section = section[parent]
    section[leaf] = value


# What to write in place of a value of a wrong type, by pydantic's name of the error.
TYPE_REMEDIES = {
    "int_type": "write a whole number, as in 8",
    "int_parsing": "write a whole number, as in 8",
    "int_from_float": "write a whole number, as in 8",
    "float_type": "write a number, as in 0.5",
    "float_parsing": "write a number, as in 0.5",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "tuple_type": "write a list, as in [a, b]",
    "dict_type": "write a table, as in {name: value}",
}


def validation_message(error: ValidationError, prefix: str, model: type[BaseModel]) -> str:
    """The first fault of a validation as one sentence that begins with `prefix`, and the number of
    further ones.
    """
    # An unknown field comes first: its misspelling explains the one that is missing.
    faults = sorted(
        error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden"
    )
    fault = faults[0]
    # pydantic marks a fault of a key, as in network.extra.1-X.[key]; the key is named already.
    is_key = fault["loc"][-1:] == ("[key]",)
    field = ".".join(str(part) for part in fault["loc"][: -1 if is_key else None])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    kind, message = fault["type"], fault["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{prefix} {field} does not exist: {_remedy(fault['loc'], model)}{more}"
    if kind == "missing":
        return f"{prefix} {field} is missing: add it{more}"
    if kind == "model_type":
        value = _shortened(fault["input"])
        return f"{prefix} {field}={value} is a section: write its fields below it{more}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
        nearest = nearest_name(fault["input"], allowed)
        message += f", did you mean {nearest}?" if nearest else ""
    if kind == "string_pattern_mismatch":
        message = PATTERN_REMEDIES[fault["ctx"]["pattern"]]
    if kind == "too_short":
        message = f"it needs at least {fault['ctx']['min_length']} entry"
    if kind in TYPE_REMEDIES:
        message += f": {TYPE_REMEDIES[kind]}"
    if kind == "string_type":
        message += f": {_string_remedy(fault['input'])}"
    if not field:
        return f"{prefix.removesuffix('field').rstrip(' :')}: {message}{more}"
    value = "" if is_key or isinstance(fault["input"], dict) else f"={_shortened(fault['input'])}"
    return f"{prefix} {field}{value}: {message[:1].lower()}{message[1:]}{more}"


def _string_remedy(value: Any) -> str:
    """What to write in place of a value that is no text: YAML reads numbers, dates and words such
    as `yes` as other types.
    """
    if value is None:
        return "it is empty, write a text"
    if isinstance(value, (list, tuple)):
        return f'write one text, as in "{",".join(map(str, value))}"'
    return f'write it in quotes, as in "{str(value).lower() if value is True else value}"'


def _shortened(value: Any) -> str:
    """A value in a message, without the middle of a long one."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    return short.repr(value)


def _remedy(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The nearest known field, for an unknown one at `location`."""
    section: Any = model
    for part in location[:-1]:
        if part not in section.model_fields:  # a key of a table, as in jobs.train
            continue
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            return "remove it"
        section = sections[0]
    return did_you_mean(location[-1], section.model_fields)
