"""YAML that people write, as plain values: texts, numbers, true, false, null, lists, mappings. All
else is one sentence.

YAML can say more: a key twice (the last one counts, without a word), anchors that multiply into
gigabytes or hold themselves, tags that make other objects. No file of ours needs any of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from pocl_ds.errors import RecipeError

LARGEST = (
    1 << 20
)  # bytes of a file; a data file that was named by mistake would be read for minutes
MOST_VALUES, DEEPEST = 100_000, 32


class _Loader(yaml.SafeLoader):
    """Plain values only. A date stays the text that it is; 1e-3 is a number, as in YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ConstructorError(
                        None, None, f"{key.value!r} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (
            ValueError,
            LookupError,
        ):  # !!int abc, !!int, !!bool abc, or more digits than Python reads
            raise ConstructorError(
                None, None, f"{node.value[:40]!r} is not what its tag says", node.start_mark
            ) from None
        if isinstance(value, int) and value.bit_length() > 64:
            raise ConstructorError(
                None, None, f"{node.value[:40]!r} is a number beyond 64 bits", node.start_mark
            )
        return value

    def construct_undefined(self, node: Node) -> Any:
        raise ConstructorError(
            None,
            None,
            f"the tag {node.tag} makes something else than a plain value",
            node.start_mark,
        )


_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    None: _Loader.construct_undefined,
    **{
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag and tag.rpartition(":")[2] in _PLAIN
    },
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as it was."""

    def represent_str(self, data: str) -> ScalarNode:
        # PyYAML's other styles write them as they are, and read a break of the line.
        style = '"' if any(letter in data for letter in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile("^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(path: Path) -> Any:
    """The plain value in a file. Raises RecipeError naming file, line and fault."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise RecipeError(
                f"{path} has {size} bytes, more than any recipe, study or profile: check that it "
                f"is the right file"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): check the file") from None
    try:
        return plain_value(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where} is not valid YAML ({fault(error)}): mend it") from None


def plain_value(text: str) -> Any:
    """The plain value that a text stands for. Raises yaml.YAMLError, whatever is wrong with it."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 -- a SafeLoader with less
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    left, found = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        found += 1
        if depth > DEEPEST:  # an anchor may hold itself
            raise yaml.YAMLError(f"it is more than {DEEPEST} levels deep")
        if found > MOST_VALUES:  # a few lines of anchors may stand for billions
            raise yaml.YAMLError(f"it stands for more than {MOST_VALUES} values")
        if isinstance(one, str) and (
            "\0" in one or any("\ud800" <= letter <= "\udfff" for letter in one)
        ):
            raise yaml.YAMLError("a text holds a zero byte or half a character")
        if isinstance(one, dict):
            left += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            left += [(part, depth + 1) for part in one]
    return value


def dump_yaml(value: Any) -> str:
    """A plain value as YAML; `plain_value` of it is the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def fault(error: yaml.YAMLError) -> str:
    """What is wrong, on one line and without the place."""
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(said).split())
