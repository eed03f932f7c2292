"""YAML files that people write: recipes, studies and profiles.

`yaml.SafeLoader` with these differences: a duplicate key is an error, `1e-3` is a number (as in
YAML 1.2), a date and a time such as `1:30:00` stay text (Hub revisions may look like one), tags for
sets and bytes are errors, and so are merge keys and aliases that expand without end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from pocl_ds.errors import RecipeError, decode_fault

MAX_BYTES = 1 << 20  # a larger file is data that was named by mistake
MAX_VALUES, MAX_DEPTH, MAX_BITS, MAX_DIGITS = 100_000, 32, 64, 400
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if key.tag == "tag:yaml.org,2002:merge":  # nested ones expand without end
                    raise _error_at(key, "merge keys (<<) are not read, write the fields out")
                if key.value in keys:
                    raise _error_at(key, f"the key {key.value!r} appears twice")
                keys.add(key.value)
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        # A number of base 60, or of so many digits that reading them takes minutes.
        is_number = isinstance(node, ScalarNode) and node.tag in NUMBER_TAGS
        if is_number and (":" in node.value or len(node.value) > MAX_DIGITS):
            raise _error_at(node, f"{node.value[:40]!r} is not of the type of its tag")
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError):  # `!!int abc`, or more digits than Python reads
            raise _error_at(node, f"{node.value[:40]!r} is not of the type of its tag") from None
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _error_at(node, f"{node.value[:40]!r} has more than {MAX_BITS} bits")
        return value

    def construct_undefined(self, node: Node) -> Any:
        raise _error_at(node, f"the tag {node.tag} is not allowed")


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> ScalarNode:
        # PyYAML writes these line separators unchanged and reads them as a line break.
        style = '"' if any(letter in data for letter in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


def _error_at(node: Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


for _tag in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_undefined)
_Loader.add_constructor(None, _Loader.construct_undefined)


def _without_colon(tag: str, pattern: re.Pattern[str]) -> tuple[str, re.Pattern[str]]:
    """A resolver of numbers that leaves those of base 60, such as 1:30, to be text."""
    if tag in NUMBER_TAGS:
        pattern = re.compile(f"(?!.*:){pattern.pattern}", pattern.flags)
    return tag, pattern


_Loader.yaml_implicit_resolvers = {
    letter: [_without_colon(*resolver) for resolver in resolvers if ":timestamp" not in resolver[0]]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.add_representer(str, _Dumper.represent_str)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile("^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(path: Path) -> Any:
    """Read a file into a plain value: strings, numbers, booleans, null, lists and dictionaries.

    Raises RecipeError with the file, the line and the fault.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(
                f"{path} has {size} bytes, more than any recipe, study or profile: check that it "
                "is the right file"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 ({decode_fault(error)}): convert it") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): check the file") from None
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line} is not valid YAML ({yaml_fault(error)}): fix it") from None


def parse_yaml(text: str) -> Any:
    """Parse a YAML text into a plain value. Raises yaml.YAMLError for every fault."""
    try:
        root = yaml.load(text, _Loader)  # noqa: S506 -- a stricter SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    # Aliases are shared objects: a few lines may expand to billions of values, or contain
    # themselves.
    pending, count = [(root, 0)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES} values")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise yaml.YAMLError("a text has a null character or half of a surrogate pair")
        if isinstance(value, dict):
            pending += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            pending += [(part, depth + 1) for part in value]
    return root


def dump_yaml(value: Any) -> str:
    """A plain value as YAML; `parse_yaml` reads the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def yaml_fault(error: yaml.YAMLError) -> str:
    """What is wrong, on one line and without the position."""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(problem).split())
