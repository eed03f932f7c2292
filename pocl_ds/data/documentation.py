"""The data source `documentation`: instruction samples from docstrings of installed packages.

The response to "Explain what `textwrap.dedent` does." is the first paragraph of its docstring. The
sources are parsed, not imported, so nothing runs and nothing is downloaded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from pocl_ds.config import DocumentationConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.errors import DataError

QUESTION_TEMPLATES = {
    "function": (
        "Explain what the Python function `{name}` does.",
        "What does `{name}` do in Python?",
        "Describe the Python function `{name}`.",
        "What is `{name}` used for?",
    ),
    "class": (
        "What is the Python class `{name}` for?",
        "Explain the purpose of the Python class `{name}`.",
        "Describe `{name}` in one or two sentences.",
        "What does the class `{name}` represent?",
    ),
    "module": (
        "What is the Python module `{name}` for?",
        "Describe the Python module `{name}`.",
        "Explain what the module `{name}` provides.",
        "What would one use the Python module `{name}` for?",
    ),
}
SKIPPED_MODULES = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "__pycache__",
    "_vendor",
    "third_party",
    "vendor",
    "__main__",
}
BOILERPLATE = re.compile(
    r"deprecated|todo|fixme|see the documentation|internal use|do not use|copyright|licen[cs]e",
    re.I,
)
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`")
# Matches *word*, but not *args, 2 * 3 or `*`.
EMPHASIS = re.compile(r"(?<![\w*`])\*{1,2}([A-Za-z][^*`]*?[\w.)])\*{1,2}(?![\w*`])")
SIGNATURE = re.compile(r"^[\w.*, ]*\w+\(.*\)(\s*->.*)?\s*$")
SECTION_HEADING = re.compile(
    r"^(parameters|returns?|args|arguments|raises|yields|notes?|examples?|see also|attributes)"
    r"\s*:?\s*$",
    re.I,
)


def extract_documentation_samples(config: DocumentationConfig) -> Iterator[Sample]:
    """Samples of all configured packages, in the order of config.packages.

    No name and no answer occurs twice. Raises DataError for a package that is not installed or has
    no sources.
    """
    names: set[str] = set()
    answers: set[str] = set()
    for package in config.packages:
        for kind, name, docstring in _public_docstrings(package):
            answer = first_paragraph(docstring)
            words = len(answer.split())
            if not config.min_words <= words <= config.max_words or BOILERPLATE.search(answer):
                continue
            if name in names or answer in answers or not _is_prose(answer):
                continue
            names.add(name)
            answers.add(answer)
            digest = hashlib.sha256(name.encode()).hexdigest()
            templates = QUESTION_TEMPLATES[kind]
            question = templates[int(digest[:8], 16) % len(templates)].format(name=name)
            yield Sample.from_instruction(digest[:16], question, answer)


def first_paragraph(docstring: str) -> str:
    """The first paragraph of prose as one line without markup; empty if there is none."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line for line in block.splitlines() if line.strip()]
        while lines and SIGNATURE.match(lines[0].strip()):  # as in docstrings of C functions
            lines.pop(0)
        # Skip headings, lists, options, examples, tables and underlined titles.
        if (
            not lines
            or SECTION_HEADING.match(lines[0].strip())
            or re.match(r"^\s*([-=~*^#.|+>]|:\w)", lines[0])
        ):
            continue
        if any(line.lstrip().startswith((">>>", ".. ", "|", "+-")) for line in lines) or set(
            lines[-1].strip()
        ) <= set("=-~^"):
            continue
        return _without_markup(" ".join(line.strip() for line in lines))
    return ""


def _without_markup(text: str) -> str:
    """Running text without reStructuredText roles, links, emphasis and field lists."""
    text = ROLE.sub(r"\1", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^>]+>`_+", r"\1", text)
    text = re.sub(r"`([^`<]+)`_+(?!\w)", r"\1", text)
    text = EMPHASIS.sub(r"\1", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.split(r"\s:(?:param|type|returns?|rtype|raises?)\b", text)[0]
    text = re.sub(r":\s*:?$|::$|(?<!\.)\.\.$", ".", text)
    return text if text[-1:] in ".!?" else f"{text}." if text else ""


def _is_prose(answer: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in answer)
    return (
        answer.isascii()
        and letters >= 0.75 * len(answer)
        and answer[0].isalnum()
        and "http" not in answer
    )


def _public_docstrings(package: str) -> Iterator[tuple[str, str, str]]:
    """(kind, dotted name, docstring) of every public module, class and function of a package."""
    sources = list(_source_files(package))
    if not sources:
        raise DataError(
            f"data.documentation.packages names {package!r}, which has no public Python "
            "sources: name a whole package, such as numpy, or leave it out"
        )
    for path, module in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escape sequences in old sources
                tree = ast.parse(path.read_text(encoding="utf-8", errors="strict"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        if docstring := ast.get_docstring(tree, clean=False):
            yield "module", module, docstring
        yield from _members(tree, module)


def _members(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str, str]]:
    for child in node.body:
        if not isinstance(
            child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) or child.name.startswith("_"):
            continue
        kind = "class" if isinstance(child, ast.ClassDef) else "function"
        name = f"{prefix}.{child.name}"
        if docstring := ast.get_docstring(child, clean=False):
            yield kind, name, docstring
        if isinstance(child, ast.ClassDef):
            yield from _members(child, name)


def _source_files(package: str) -> Iterator[tuple[Path, str]]:
    """Sorted source files and module names of the standard library or one package, without private
    and test modules.
    """
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        module_paths = [root / name for name in sorted(sys.stdlib_module_names)]
    elif "." in package:  # finding a subpackage would import its parent
        return
    else:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            raise DataError(
                f"data.documentation.packages names {package!r}, which is not installed: install "
                "it or leave it out"
            )
        module_path = Path(spec.origin)
        root = module_path.parents[1] if module_path.name == "__init__.py" else module_path.parent
        module_paths = [root / package]
    # Every file below, as a dotted module name.
    for module_path in module_paths:
        files = (
            sorted(module_path.rglob("*.py"))
            if module_path.is_dir()
            else [module_path.with_suffix(".py")]
        )
        for path in files:
            parts = list(path.relative_to(root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            if (
                path.is_file()
                and parts
                and not any(part.startswith("_") or part in SKIPPED_MODULES for part in parts)
            ):
                yield path, ".".join(parts)
