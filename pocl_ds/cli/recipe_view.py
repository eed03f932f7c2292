"""A resolved recipe as YAML in which every value that differs from its default is marked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from pocl_ds.config import Recipe
from pocl_ds.config.yaml_io import dump_yaml

REQUIRED = "required"  # stands for the default of a field that has none


@dataclass(frozen=True)
class Entry:
    """One field of a recipe, or the header of a section.

    yaml: its lines. default: the default value as YAML if the value differs from it, else None.
    """

    yaml: str
    default: str | None = None

    @property
    def commented(self) -> str:
        """The lines with the default as a comment: after a single line, above several lines."""
        if self.default is None:
            return self.yaml
        comment = "# required" if self.default == REQUIRED else f"# default: {self.default}"
        if "\n" not in self.yaml:
            return f"{self.yaml}  {comment}"
        indent = self.yaml[: len(self.yaml) - len(self.yaml.lstrip())]
        return f"{indent}{comment}\n{self.yaml}"


def recipe_entries(recipe: Recipe) -> list[Entry]:
    """The fields of a recipe, in order; joined by line breaks they are the recipe as YAML."""
    return list(_entries(recipe, ""))


def _entries(section: BaseModel, indent: str) -> Iterator[Entry]:
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        required = field.is_required()
        default = None if required else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            null_by_default = default is None and not required
            yield Entry(f"{indent}{name}:", "null" if null_by_default else None)
            yield from _entries(value, f"{indent}  ")
            continue
        lines = dump_yaml({name: plain[name]}).splitlines()
        text = "\n".join(f"{indent}{line}" for line in lines)
        if required:
            yield Entry(text, REQUIRED)
        else:
            yield Entry(text, None if value == default else _one_line(default))


def _one_line(value: Any) -> str:
    """A plain value as YAML on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_one_line(part) for part in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_one_line(part)}" for key, part in value.items()) + "}"
    return " ".join(dump_yaml(value).removesuffix("...\n").split())


def field_names(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a recipe."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        candidates = [field.annotation, *get_args(field.annotation)]
        nested = next(
            (kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)),
            None,
        )
        if nested is None:
            names.append(f"{prefix}{name}")
        else:
            names += field_names(nested, f"{prefix}{name}.")
    return names
