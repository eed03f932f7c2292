"""An mkdocs hook: when the site is built, write `reference/recipe.md`, `reference/profile.md` and
`reference/cli.md`, and copy `examples/`.

The fields come from the JSON schemas of `pocl_ds.config.Recipe` and of the profile, the commands
from the click commands behind `pocl_ds.cli.main.app`. `tests/unit/docs` uses the same walks to
check what the pages, the README and the recipes in them name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

RECIPE_PAGE, PROFILE_PAGE = "reference/recipe.md", "reference/profile.md"
CLI_PAGE = "reference/cli.md"
PAGES = (RECIPE_PAGE, PROFILE_PAGE, CLI_PAGE)
EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class RecipeField:
    """One field of the recipe. path: dotted; a list or table of sections contributes one name."""

    path: str
    type: str
    default: str
    description: str
    runtime_only: bool


@dataclass
class RecipeSection:
    """One section of the recipe with its own fields. path: dotted, empty for the top level."""

    path: str
    description: str
    kind: str = ""  # "list" or "table" where a recipe may hold several
    optional: bool = False
    fields: list[RecipeField] = field(default_factory=list)


@cache
def recipe_sections() -> tuple[RecipeSection, ...]:
    """Every section of the recipe, in the order of the schema, the top level first."""
    from pocl_ds.config import Recipe

    schema = Recipe.model_json_schema()
    top = RecipeSection("", "Fields above all sections.")
    return tuple(walk_schema(schema, schema.get("$defs", {}), top))


def recipe_fields() -> dict[str, RecipeField]:
    """Every field of the recipe by its dotted name."""
    return {entry.path: entry for section in recipe_sections() for entry in section.fields}


def open_tables() -> list[str]:
    """Dotted names of fields whose keys a user chooses, as in `loss.options`."""
    return [path for path, entry in recipe_fields().items() if entry.type.startswith("table")] + [
        section.path for section in recipe_sections() if section.kind == "table"
    ]


def walk_schema(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], section: RecipeSection
) -> Iterator[RecipeSection]:
    nested: list[tuple[RecipeSection, Mapping[str, Any]]] = []
    for name, tree in schema.get("properties", {}).items():
        path = f"{section.path}.{name}".removeprefix(".")
        reference, kind, optional = _section_reference(tree)
        if reference is not None:
            child = definitions[reference]
            text = str(tree.get("description") or child.get("description") or "")
            nested.append((RecipeSection(path, _sentence(text), kind, optional), child))
            continue
        section.fields.append(
            RecipeField(
                path,
                _type_of(path, tree),
                _default_of(tree, name in schema.get("required", ())),
                str(tree.get("description", "")),
                bool(tree.get("runtime_only", False)),
            )
        )
    yield section
    for child_section, child in nested:
        yield from walk_schema(child, definitions, child_section)


def _section_reference(tree: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """Name of the section that a property holds, whether as a list or table, and whether it may be
    null.
    """
    parts = tree.get("anyOf", tree.get("allOf", [tree]))
    optional = any(part.get("type") == "null" for part in parts)
    for part in parts:
        values = part.get("additionalProperties")
        for kind, inner in (("", part), ("list", part.get("items")), ("table", values)):
            if isinstance(inner, Mapping) and "$ref" in inner:
                return str(inner["$ref"]).rpartition("/")[2], kind, optional
    return None, "", False


def _type_of(path: str, tree: Mapping[str, Any]) -> str:
    """A type in words: `one of a, b`, `integer ≥ 1`, `list of text`, `table`."""
    if names := _registered_names().get(path):
        return "one of " + ", ".join(f"`{name}`" for name in names)
    parts = tree.get("anyOf", [tree])
    texts = [_single_type(part) for part in parts if part.get("type") != "null"]
    if len(texts) < len(parts):
        texts.append("`null`")
    return " or ".join(dict.fromkeys(texts))


def _registered_names() -> dict[str, list[str]]:
    """Fields whose allowed values are registered names, which plug-ins extend."""
    from pocl_ds.config import registry

    return {
        "loss.name": list(registry.LOSSES),
        "loss.token_rule.name": list(registry.TOKEN_RULES),
        "policy.name": list(registry.POLICIES),
        "ranking.strategy": [*registry.STRATEGIES, *registry.OTHER_STRATEGIES],
    }


def _single_type(tree: Mapping[str, Any]) -> str:
    if "enum" in tree or "const" in tree:
        values = tree.get("enum", [tree.get("const")])
        return "one of " + ", ".join(f"`{_yaml(value)}`" for value in values)
    kind = tree.get("type")
    if kind == "array":
        if items := tree.get("prefixItems"):
            return f"list of {len(items)}: " + ", ".join(_single_type(item) for item in items)
        return "list of " + (_single_type(tree["items"]) if tree.get("items") else "values")
    if kind == "object":
        return "table"
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean"}
    return (words.get(str(kind), "any value") + _bounds(tree)).strip()


def _bounds(tree: Mapping[str, Any]) -> str:
    """` ≥ 1`, ` in [0, 1]`; bounds of 64-bit integers are left out."""
    signs = {
        "ge": "≥",
        "minimum": "≥",
        "gt": ">",
        "exclusiveMinimum": ">",
        "le": "≤",
        "maximum": "≤",
        "lt": "<",
        "exclusiveMaximum": "<",
    }
    bounds = [
        f"{sign} {tree[name]:g}"
        for name, sign in signs.items()
        if name in tree and abs(tree[name]) < 1 << 53
    ]
    return "".join(f" {bound}" if i == 0 else f" and {bound}" for i, bound in enumerate(bounds))


def _default_of(tree: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    return f"`{_yaml(tree['default'])}`" if "default" in tree else "empty"


def _yaml(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(part)}" for key, part in value.items()) + "}"
    return '""' if value == "" else str(value)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", ":")) or not text else f"{text}."


def recipe_page() -> str:
    """`reference/recipe.md`."""
    lines = [
        "# Recipe reference",
        "",
        "A recipe is one YAML file. Every field is listed here with its type, default and meaning.",
        "Override a field on the command line by its dotted name:",
        "",
        "```bash",
        "pocl run quickstart --run-dir runs/x train.lr=1e-4 curriculum.num_subsets=3",
        "pocl show quickstart      # the resolved recipe; what differs from defaults is marked",
        "```",
        "",
        "An unknown field is an error that names the nearest known field. Fields marked *runtime*",
        "say how a run is executed (ranks, shards, logging), not what it computes: changing them",
        "never invalidates finished work.",
    ]
    return "\n".join([*lines, *_section_lines(recipe_sections()), *_ds_config_lines()]) + "\n"


def profile_page() -> str:
    """`reference/profile.md`."""
    from pocl_ds.cluster.profile import Profile

    schema = Profile.model_json_schema()
    top = RecipeSection("", "Fields above all sections.")
    sections = tuple(walk_schema(schema, schema.get("$defs", {}), top))
    lines = [
        "# Profile reference",
        "",
        "A profile is one YAML file with the options that jobs need on a cluster, and no",
        "hyper-parameters. `pocl profile detect` writes one from what SLURM reports,",
        "`pocl profile show NAME` prints one with its defaults. Texts that YAML would read as",
        "numbers need quotes: a time limit, a number in `environment`.",
    ]
    return "\n".join([*lines, *_section_lines(sections)]) + "\n"


def _section_lines(sections: Iterable[RecipeSection]) -> list[str]:
    """A heading and a table of fields for each section."""
    lines: list[str] = []
    for section in sections:
        level = "##" if section.path.count(".") == 0 else "###"
        kind = {"list": " A list of entries.", "table": " A table of named entries."}
        note = kind.get(section.kind, "") + (" May be `null`." if section.optional else "")
        title = section.path or "Top level"
        lines += ["", f"{level} {title} {{#{section.path or 'top-level'}}}", ""]
        lines += [f"{section.description}{note}".strip(), ""]
        if section.fields:
            lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
            lines += [_row(section, entry) for entry in section.fields]
    return lines


def _ds_config_lines() -> list[str]:
    """The shipped DeepSpeed configurations, and when to use each."""
    from pocl_ds.config.ds_config import shipped_descriptions

    rows = shipped_descriptions().items()
    return [
        "",
        "## DeepSpeed configurations {#ds-configs}",
        "",
        "Values of `student.ds_config` and `teacher.ds_config`. Each is a file in `ds_configs/`;",
        "the path of a file of your own works too. `auto` in a file is filled in from the recipe,",
        "the model's hidden size and the number of ranks of a node.",
        "",
        "| name | when to use it |",
        "|---|---|",
        *(_table_row((f"`{name}`", description)) for name, description in rows),
    ]


def _row(section: RecipeSection, entry: RecipeField) -> str:
    marker = " *runtime*" if entry.runtime_only else ""
    anchor = f'<a id="{entry.path}"></a>' if entry.path != section.path else ""
    cells = (
        f"{anchor}`{entry.path}`",
        entry.type,
        entry.default,
        _sentence(entry.description[:1].upper() + entry.description[1:]) + marker,
    )
    return _table_row(cells)


def _table_row(cells: Iterable[str]) -> str:
    """A row of a table; a pipe ends a cell, except in code."""
    escaped = (re.sub(r"(`[^`]*`)|\|", lambda m: m[1] or "&#124;", cell) for cell in cells)
    return "| " + " | ".join(escaped) + " |"


@dataclass(frozen=True)
class Command:
    """One command. name: words after `pocl`; parameters: of click, as they are."""

    name: str
    panel: str
    help: str
    example: str
    usage: str
    parameters: tuple[Any, ...]


@cache
def commands() -> tuple[Command, ...]:
    """Every command of `pocl`, in the order of the help."""
    import typer.main

    from pocl_ds.cli.main import app

    return tuple(walk_commands(typer.main.get_command(app)))


def walk_commands(group: Any, prefix: str = "", panel: str = "Commands") -> Iterator[Command]:
    """The commands below a click group, those of nested groups too. panel: of commands that name
    none.
    """
    for name, command in group.commands.items():
        if getattr(command, "hidden", False):
            continue
        full = f"{prefix} {name}".strip()
        own_panel = str(getattr(command, "rich_help_panel", None) or panel)
        if hasattr(command, "commands"):
            yield from walk_commands(command, full, own_panel)
            continue
        text, examples = _split_help(command, full)
        parameters = tuple(p for p in command.params if not getattr(p, "hidden", False))
        yield Command(
            full,
            own_panel,
            text,
            examples,
            _usage(full, parameters),
            parameters,
        )


def _split_help(command: Any, name: str) -> tuple[str, str]:
    """The help text, and the lines that show an example: `pocl NAME ...`."""
    text = f"{command.help or ''}\n\n{command.epilog or ''}".replace("\b", "").replace("\f", "")
    text = re.sub(r"\[/?[a-z][a-z ]*\]", "", text)  # rich markup
    pattern = re.compile(rf"pocl {re.escape(name)}\b.*")
    examples = [
        match[0].strip("` ") for line in text.splitlines() if (match := pattern.search(line))
    ]
    lines = [line for line in text.splitlines() if not pattern.search(line)]
    prose = [line for line in lines if not re.fullmatch(r"\s*examples?:?\s*", line, re.IGNORECASE)]
    paragraphs = re.split(r"\n\s*\n", "\n".join(prose).strip())
    prose_text = "\n\n".join(" ".join(part.split()) for part in paragraphs if part.strip())
    return prose_text, "\n".join(examples)


def _usage(name: str, parameters: tuple[Any, ...]) -> str:
    words = [f"pocl {name}"]
    if any(not _is_argument(parameter) for parameter in parameters):
        words.append("[OPTIONS]")
    for parameter in filter(_is_argument, parameters):
        word = _metavar(parameter)
        word = f"{word}..." if parameter.nargs == -1 else word
        words.append(word if parameter.required else f"[{word}]")
    return " ".join(words)


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def cli_page() -> str:
    """`reference/cli.md`."""
    lines = [
        "# Command-line reference",
        "",
        "```bash",
        "pocl --help               # the commands by panel",
        "pocl run --help           # one command",
        "pocl --install-completion # completion for your shell",
        "```",
        "",
        "Words of the form `section.field=value` are overrides of the [recipe](recipe.md).",
        "`--run-dir` names the run directory everywhere. The exit code says whether the same",
        "command may be started again: see",
        "[Exit codes](../concepts/reproducibility-and-resume.md#exit-codes).",
    ]
    panels = dict.fromkeys(command.panel for command in commands())
    for panel in panels:
        lines += ["", f"## {panel}"]
        for command in commands():
            if command.panel == panel:
                lines += ["", *_command_lines(command)]
    return "\n".join(lines) + "\n"


def _command_lines(command: Command) -> list[str]:
    anchor = command.name.replace(" ", "-")
    lines = [f"### pocl {command.name} {{#{anchor}}}", "", command.help, ""]
    lines += ["```text", command.usage, "```", ""]
    if command.parameters:
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [_parameter_row(parameter) for parameter in command.parameters]
    if command.example:
        lines += ["", "Example:", "", "```bash", *command.example.splitlines(), "```"]
    return lines


def _parameter_row(parameter: Any) -> str:
    if _is_argument(parameter):
        name = f"`{_metavar(parameter)}`"
    else:
        flags = [*parameter.opts, *parameter.secondary_opts]
        value_name = "" if parameter.is_flag else f" {_metavar(parameter)}"
        name = ", ".join(f"`{flag}{value_name}`" for flag in flags)
    text = _sentence(str(getattr(parameter, "help", None) or ""))
    if choices := _choices(parameter):
        text += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
    if parameter.multiple:
        text += " May be repeated."
    default = parameter.show_default if isinstance(parameter.show_default, str) else None
    if default is None and not callable(parameter.default):
        default = "" if parameter.default in (None, False, (), []) else str(parameter.default)
    cells = (name, f"`{default}`" if default else "", text.strip())
    return _table_row(cells)


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _choices(parameter: Any) -> list[str]:
    """The values that a parameter's annotation allows, as an enumeration or a literal."""
    descriptor = getattr(parameter, "type_descriptor", None)
    open_annotations = [getattr(descriptor, "annotation", None)]
    while open_annotations:
        annotation = open_annotations.pop()
        if isinstance(annotation, type) and issubclass(annotation, Enum):
            return [str(member.value) for member in annotation]
        if get_origin(annotation) is Literal:
            return [str(value) for value in get_args(annotation)]
        open_annotations += get_args(annotation)
    return []


def pages() -> dict[str, str]:
    """The generated pages: path below docs/ -> Markdown."""
    return {RECIPE_PAGE: recipe_page(), PROFILE_PAGE: profile_page(), CLI_PAGE: cli_page()}


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Called by mkdocs once the pages on disk are known: add generated pages and the examples."""
    from mkdocs.structure.files import File, InclusionLevel

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for file in sorted(EXAMPLES.glob("*.py")):
        files.append(
            File.generated(
                config,
                f"examples/{file.name}",
                content=file.read_text(encoding="utf-8"),
                inclusion=InclusionLevel.INCLUDED,
            )
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the Markdown of each page: links to `examples/` of the checkout become
    links to the copies in the site.
    """
    return re.sub(r"\]\((?:\.\./)((?:\.\./)*examples/\w+\.py)\)", r"](\1)", markdown)
