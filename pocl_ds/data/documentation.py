"""The default corpus: instruction-response pairs from documentation that the machine already has.

Docstrings of the standard library and of installed packages, read from their sources without
importing or running anything: "Explain what `textwrap.dedent` does." -> the first paragraph of its
docstring. Real human text, no download.
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
from pocl_ds.data.records import Sample
from pocl_ds.errors import DataError

QUESTIONS = {
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
SKIPPED = {
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
EMPHASIS = re.compile(
    r"(?<![\w*`])\*{1,2}([A-Za-z][^*`]*?[\w.)])\*{1,2}(?![\w*`])"
)  # but not *args, 2 * 3 or `*`
SIGNATURE = re.compile(r"^[\w.*, ]*\w+\(.*\)(\s*->.*)?\s*$")
SECTION = re.compile(
    r"^(parameters|returns?|args|arguments|raises|yields|notes?|examples?|see "
    r"also|attributes)\s*:?\s*$",
    re.I,
)


def harvest(config: DocumentationConfig) -> Iterator[Sample]:
    """Pairs of all configured packages, in the order of their names; no answer and no name twice.

    Raises DataError for a package that is not installed, and for one without sources.
    """
    names: set[str] = set()
    answers: set[str] = set()
    for package in config.packages:
        for kind, name, docstring in _documented(package):
            answer = first_paragraph(docstring)
            words = len(answer.split())
            if not config.min_words <= words <= config.max_words or BOILERPLATE.search(answer):
                continue
            if name in names or answer in answers or not _is_prose(answer):
                continue
            names.add(name)
            answers.add(answer)
            digest = hashlib.sha256(name.encode()).hexdigest()
            forms = QUESTIONS[kind]
            question = forms[int(digest[:8], 16) % len(forms)].format(name=name)
            yield Sample(digest[:16], question, "", (answer,))


def first_paragraph(docstring: str) -> str:
    """The first paragraph of running text, as one line without markup; empty where there is none."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line for line in block.splitlines() if line.strip()]
        while lines and SIGNATURE.match(lines[0].strip()):  # C functions open with their signature
            lines.pop(0)
        if (
            not lines
            or SECTION.match(lines[0].strip())
            or re.match(r"^\s*([-=~*^#.|+>]|:\w)", lines[0])
        ):
            continue
        if any(line.lstrip().startswith((">>>", ".. ", "|", "+-")) for line in lines) or set(
            lines[-1].strip()
        ) <= set("=-~^"):
            continue
        return _plain(" ".join(line.strip() for line in lines))
    return ""


def _plain(text: str) -> str:
    text = ROLE.sub(r"\1", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^>]+>`_+", r"\1", text)
    text = re.sub(r"`([^`<]+)`_+(?!\w)", r"\1", text)
    text = EMPHASIS.sub(r"\1", text)
    text = re.split(
        r"\s:(?:param|type|returns?|rtype|raises?)\b", re.sub(r"\s+", " ", text).strip()
    )[0]
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


def _documented(package: str) -> Iterator[tuple[str, str, str]]:
    """(kind, dotted name, docstring) of everything public in a package, from its sources."""
    sources = list(_sources(package))
    if not sources:
        raise DataError(
            f"data.documentation.packages names {package!r}, which has no public Python sources "
            f"of its own: name a "
            "whole package, as numpy, or leave it out"
        )
    for path, module in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's files
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


def _sources(package: str) -> Iterator[tuple[Path, str]]:
    """Source files and module names of the standard library or one package, sorted; private and
    test modules left out.
    """
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        tops = [root / name for name in sorted(sys.stdlib_module_names)]
    elif "." in package:  # to find a part of a package would import the package
        return
    else:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            raise DataError(
                f"data.documentation.packages names {package!r}, which is not installed: install "
                f"it or leave it out"
            )
        top = Path(spec.origin)
        root = top.parents[1] if top.name == "__init__.py" else top.parent
        tops = [root / package]
    for top in tops:
        files = sorted(top.rglob("*.py")) if top.is_dir() else [top.with_suffix(".py")]
        for path in files:
            parts = list(path.relative_to(root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            if (
                path.is_file()
                and parts
                and not any(part.startswith("_") or part in SKIPPED for part in parts)
            ):
                yield path, ".".join(parts)
