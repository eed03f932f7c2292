"""Checks of Markdown pages against the program: recipes, fields, commands, code blocks, links.

Each check takes a page and returns one sentence per fault. `tests/unit/docs` runs the checks over
the documentation, and over small bad pages to prove that they can fail.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from doc_pages import ROOT, SPAN, Block, Page, anchors, load_generator

from pocl_ds.errors import PoclError

# The smallest recipe with a teacher: partial recipes of the pages are merged into it.
MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "data": {"source": "train.jsonl"},
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student"},
}
FILE_ENDINGS = (".md", ".html", ".json", ".jsonl", ".yaml", ".yml", ".py", ".sh", ".parquet")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_DOTTED = re.compile(r"^([a-z_]+(?:\.[a-zA-Z_][\w-]*)+)(?:\s*[:=]\s*(.*))?$")


def check_yaml(page: Page) -> list[str]:
    """Every YAML block is accepted by the program's reader for recipes, studies or profiles."""
    faults = []
    for block in page.blocks:
        if block.language not in ("yaml", "yml"):
            continue
        try:
            _read_yaml_block(page, block)
        except (PoclError, yaml.YAMLError, subprocess.CalledProcessError, ValueError) as error:
            text = getattr(error, "stderr", None) or str(error)
            faults.append(f"{page.path} line {block.line}: {' '.join(text.split())[-600:]}")
    return faults


def _read_yaml_block(page: Page, block: Block) -> None:
    tree = yaml.safe_load(block.body)
    if not isinstance(tree, dict):
        raise ValueError("a YAML block holds no fields")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "arms" in tree:
            _write(folder / "study.yaml", block.body)
            from pocl_ds.study.cells import expand_cells, load_study

            expand_cells(load_study(str(folder / "study.yaml")))
        elif {"partition", "gpus_per_node", "cpus_per_node"} & set(tree):
            _write(folder / "profile.yaml", block.body)
            from pocl_ds.cluster.profile import load_profile

            load_profile(str(folder / "profile.yaml"))
        else:
            complete = {"name", "student"} <= set(tree)
            merged = tree if complete else _merge(MINIMAL, tree)
            _write(folder / "recipe.yaml", yaml.safe_dump(merged))
            _read_recipe(page, folder, plugins=bool(tree.get("plugins")))


def _read_recipe(page: Page, folder: Path, *, plugins: bool) -> None:
    if not plugins:
        from pocl_ds.config.recipe_file import load_recipe

        load_recipe(str(folder / "recipe.yaml"))
        return
    # A plugin stays registered until its process ends, so it runs in a separate process. The
    # page's titled Python blocks are its files, and the divergence that it adds is called once.
    for block in page.blocks:
        if block.language == "python" and block.title:
            _write(folder / block.title, block.body)
    program = (
        "import torch\n"
        "from pocl_ds.config.recipe_file import load_recipe\n"
        "from pocl_ds.losses import divergence\n"
        "recipe = load_recipe('recipe.yaml')\n"
        "logits = torch.randn(2, 3, 7)\n"
        "value = divergence(recipe.loss.name, *logits, reduction='none', **recipe.loss.options)\n"
        "assert value.shape == (3,) and value.isfinite().all()\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )


def _merge(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in other.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def check_python(page: Page) -> list[str]:
    """Every Python block compiles, what it imports from pocl_ds exists, and the output of a block
    that is marked as executed equals its comments.
    """
    faults = []
    for block in page.blocks:
        if block.language not in ("python", "py"):
            continue
        where = f"{page.path} line {block.line}"
        try:
            tree = ast.parse(block.body)
        except SyntaxError as error:
            faults.append(f"{where}: the Python block does not compile ({error})")
            continue
        faults += [f"{where}: {fault}" for fault in _missing_imports(tree)]
        if block.executed:
            faults += [f"{where}: {fault}" for fault in _wrong_output(block.body)]
    return faults


def _missing_imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "pocl_ds":
            continue
        try:
            module = importlib.import_module(str(node.module))
        except ImportError as error:
            yield f"{node.module} cannot be imported ({error})"
            continue
        for alias in node.names:
            if hasattr(module, alias.name):
                continue
            try:
                importlib.import_module(f"{node.module}.{alias.name}")
            except ImportError:
                yield f"{node.module} has no {alias.name}"


def _wrong_output(code: str) -> Iterator[str]:
    """Compare the lines that a block prints with the comments behind its `print` calls."""
    expected = re.findall(r"^print\(.*\)\s+#\s+(.*)$", code, re.MULTILINE)
    output = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "block.py", code)
        try:
            with contextlib.redirect_stdout(output):
                runpy.run_path(str(Path(folder) / "block.py"))
        except Exception as error:
            yield f"the block fails ({type(error).__name__}: {error})"
            return
    printed = output.getvalue().splitlines()
    if expected and printed != expected:
        yield f"the block prints {printed}, its comments say {expected}"


def check_json(page: Page) -> list[str]:
    """Every JSON block parses, and every JSON-lines block is read as instruction data."""
    from pocl_ds.data.sources import read_samples

    faults = []
    for block in page.blocks:
        where = f"{page.path} line {block.line}"
        if block.language == "json":
            try:
                json.loads(block.body)
            except ValueError as error:
                faults.append(f"{where}: the JSON block does not parse ({error})")
        elif block.language == "jsonl":
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "block.jsonl"
                _write(file, block.body)
                try:
                    list(read_samples(str(file)))
                except PoclError as error:
                    faults.append(f"{where}: {str(error).replace(str(file), 'the block')}")
    return faults


@dataclass(frozen=True)
class KnownNames:
    """Names that pages may use. commands: name -> its options; fields: dotted name -> the allowed
    values, empty if any is; tables: dotted names whose keys a user chooses.
    """

    commands: Mapping[str, Collection[str]]
    fields: Mapping[str, Collection[str]]
    sections: Collection[str]
    tables: Collection[str]


def known_names() -> KnownNames:
    """The names of this program."""
    generator = load_generator()
    commands = {}
    for command in generator.commands():
        options: set[str] = {"--help"}
        for parameter in command.parameters:
            options |= {*parameter.opts, *parameter.secondary_opts}
        commands[command.name] = options
    fields = {}
    for path, field in generator.recipe_fields().items():
        values = field.type.removeprefix("one of ") if field.type.startswith("one of ") else ""
        fields[path] = frozenset(SPAN.findall(values))
    sections = {section.path for section in generator.recipe_sections() if section.path}
    return KnownNames(commands, fields, sections, generator.open_tables())


def check_commands(page: Page, known: KnownNames) -> list[str]:
    """Every `pocl ...` in shell blocks and code spans is a command with options that it has, and
    overrides of fields that exist.
    """
    lines = [
        (block.line + number, line)
        for block in page.blocks
        if block.language in ("bash", "sh", "shell", "console")
        for number, line in enumerate(block.body.replace("\\\n", "  ").splitlines())
    ]
    lines += [(number, text) for number, text in page.spans() if text.startswith("pocl ")]
    faults = []
    for number, line in lines:
        for words in _pocl_calls(line):
            where = f"{page.path} line {number}"
            faults += [f"{where}: {fault}" for fault in _wrong_call(words, known)]
    return faults


def _pocl_calls(line: str) -> Iterator[list[str]]:
    """The words after `pocl` of each call in a shell line."""
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:
        words = line.split()
    call: list[str] | None = None
    for word in words:
        if word in ("|", "||", "&&", ";", ">", "&"):
            if call is not None:
                yield call
            call = None
        elif word == "pocl" and call is None:
            call = []
        elif call is not None:
            call.append(word)
    if call is not None:
        yield call


def _wrong_call(words: list[str], known: KnownNames) -> Iterator[str]:
    if not words or words[0].startswith("-") or words[0].isupper() or words[0] in ("X", "..."):
        return
    name = words[0]
    if len(words) > 1 and f"{name} {words[1]}" in known.commands:
        name = f"{name} {words[1]}"
    if name not in known.commands:
        yield f"there is no command `pocl {name}`"
        return
    for word in words[1:]:
        option = word.partition("=")[0]
        if name == "bench":  # each benchmark parses its own options
            continue
        if option.startswith("--") and option not in known.commands[name]:
            yield f"`pocl {name}` has no option {option}"
        elif not word.startswith("-") and _DOTTED.match(word) and "=" in word:
            yield from _wrong_field(word, known)


def check_fields(page: Page, known: KnownNames) -> list[str]:
    """Every dotted name in a code span whose first part is a section of the recipe is a field, and
    a value behind it is one that the field allows.
    """
    tops = {path.split(".")[0] for path in known.sections}
    faults = []
    for number, text in page.spans():
        match = _DOTTED.match(text)
        if match is None or match[1].split(".")[0] not in tops or match[1].endswith(FILE_ENDINGS):
            continue
        faults += [f"{page.path} line {number}: {fault}" for fault in _wrong_field(text, known)]
    return faults


def _wrong_field(text: str, known: KnownNames) -> Iterator[str]:
    match = _DOTTED.match(text)
    assert match is not None
    path, value = match[1], (match[2] or "").strip()
    if any(path == table or path.startswith(f"{table}.") for table in known.tables):
        return
    if path not in known.fields and path not in known.sections:
        yield f"there is no recipe field {path}"
    elif value and (allowed := known.fields.get(path)) and value.strip("\"'") not in allowed:
        yield f"{path} has no value {value}: it allows {', '.join(sorted(allowed))}"


def check_links(page: Page, others: Collection[Page]) -> list[str]:
    """Every relative link leads to a file of the tree, or a generated page, and to an anchor in
    it.
    """
    texts = {other.path: other.text for other in others} | {page.path: page.text}
    faults = []
    for number, line in enumerate(page.prose.splitlines(), 1):
        for match in _LINK.finditer(SPAN.sub("", line)):
            link = match[1] or match[2]
            if re.match(r"^[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            folder = Path(page.path).parent
            path = os.path.normpath(folder / target) if target else page.path
            where = f"{page.path} line {number}: link {link}"
            if path not in texts and not (ROOT / path).exists():
                faults.append(f"{where}: there is no {path}")
            elif anchor and path in texts and anchor not in anchors(texts[path]):
                faults.append(f"{where}: {path} has no anchor {anchor}")
    return faults


_PATH = re.compile(r"^(pocl_ds|tests|launch|slurm|ds_configs|docs|examples)/[\w./-]+$")
_NAME_IN_FILE = re.compile(r"`(\w+)`(?: there)? (?:in|of|at the end of)\s+`([\w/.-]+\.py)`")


def check_paths(page: Page) -> list[str]:
    """Every path of the tree in a code span exists, and `NAME` in `file.py` is in that file."""
    generated = {f"docs/{path}" for path in load_generator().PAGES}
    faults = [
        f"{page.path} line {number}: there is no {text}"
        for number, text in page.spans()
        if _PATH.match(text) and text not in generated and not (ROOT / text).exists()
    ]
    for name, path in _NAME_IN_FILE.findall(page.prose):
        file = ROOT / path
        if file.is_file() and not re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")):
            faults.append(f"{page.path}: {path} has no {name}")
    return faults


def check_citations(source: str, name: str, numbers: Collection[int]) -> list[str]:
    """Every `docs/method.md, eq. N` of a source file cites an equation that exists."""
    text = " ".join(source.split())
    cited = re.findall(r"docs/method\.md,? eqs?\.? ((?:\d+(?:, | and | to )?)+)", text)
    return [
        f"{name} cites equation {number}, which docs/method.md does not have"
        for numbers_text in cited
        for number in map(int, re.findall(r"\d+", numbers_text))
        if number not in numbers
    ]


def check_messages(page: Page, messages: Collection[str]) -> list[str]:
    """Every heading of a page that quotes a message (`### ...` in backticks) quotes one of the
    program; `…` stands for what varies.
    """
    faults = []
    for quoted in re.findall(r"^#+ `(.+)`$", page.text, re.MULTILINE):
        parts = [" ".join(part.split()) for part in quoted.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        if not any(pattern.search(message) for message in messages):
            faults.append(f"{page.path}: no message of the program reads {quoted!r}")
    return faults


def program_messages() -> list[str]:
    """Every string of the program, with `…` in place of each inserted value."""
    messages = []
    for file in sorted((ROOT / "pocl_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                ]
                messages.append(" ".join("".join(parts).split()))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(" ".join(node.value.split()))
    return messages
