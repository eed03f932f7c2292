"""Markdown pages of the documentation, their code blocks and code spans."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXECUTED = "<!-- executed by the tests -->"  # before a Python block: run it, compare its output
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"`([^`\n]+)`")


def load_generator() -> ModuleType:
    """`docs/generate_reference.py`, which no package contains."""
    name = "generate_reference"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass(frozen=True)
class Block:
    """One fenced code block. line: of its first line of code; title: of `title="..."`."""

    language: str
    title: str
    body: str
    line: int
    executed: bool


@dataclass(frozen=True)
class Page:
    """One Markdown page. path: relative to the root of the tree."""

    path: str
    text: str

    @property
    def blocks(self) -> list[Block]:
        """Its code blocks."""
        blocks = []
        for match in FENCE.finditer(self.text):
            before = self.text[: match.start()].rstrip()
            title = re.search(r'title="([^"]*)"', match["info"])
            blocks.append(
                Block(
                    match["info"].split(" ")[0].strip(),
                    title[1] if title else "",
                    re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE),
                    self.text.count("\n", 0, match.start("body")) + 1,
                    before.endswith(EXECUTED),
                )
            )
        return blocks

    @property
    def prose(self) -> str:
        """The text with its code blocks emptied, line by line."""
        return FENCE.sub(lambda match: "\n" * match[0].count("\n"), self.text)

    def spans(self) -> Iterator[tuple[int, str]]:
        """Line number and text of each inline code span."""
        for number, line in enumerate(self.prose.splitlines(), 1):
            for match in SPAN.finditer(line):
                yield number, match[1].strip()


def pages() -> list[Page]:
    """Every page that people read: the README, CONTRIBUTING, the site, and what is generated."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    files += sorted(DOCS.rglob("*.md"))
    written = [
        Page(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8"))
        for file in files
        if file.is_file()
    ]
    generated = load_generator().pages()
    return written + [Page(f"docs/{path}", text) for path, text in generated.items()]


def anchors(text: str) -> set[str]:
    """Every anchor of a page: headings, `{#names}`, `id="names"` and numbered equations."""
    prose = FENCE.sub("", text)
    names = set(re.findall(r"\{#([\w.-]+)\}", prose)) | set(re.findall(r'id="([^"]+)"', prose))
    names |= {f"eq-{number}" for number in equation_numbers(text)}
    for heading in re.findall(r"^#+ (.*?)(?:\s*\{#[^}]*\})?$", prose, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip()
        names.add(re.sub(r"[-\s]+", "-", plain.lower()))
    return names


def equation_numbers(text: str) -> list[int]:
    """Numbers of a page's equations, in order."""
    return [int(number) for number in re.findall(r"\\tag\{(\d+)\}", text)]
