"""The documentation is correct: its fields, commands and links exist, its code blocks are valid."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import doc_checks as checks
import pytest
from doc_checks import KnownNames
from doc_pages import DOCS, EXECUTED, ROOT, Page, equation_numbers, load_generator, pages

KNOWN = KnownNames(
    commands={"run": {"--run-dir", "--dry-run"}, "profile detect": {"--partition"}},
    fields={"train.lr": (), "teacher.mode": ("online", "auto")},
    sections=("train", "teacher", "loss", "train.checkpoint"),
    tables=("loss.options",),
)


@functools.cache
def _pages() -> tuple[Page, ...]:
    return tuple(pages())


@functools.cache
def _known() -> KnownNames:
    return checks.known_names()


def _faults(check: Callable[[Page], list[str]]) -> str:
    return "\n".join(fault for page in _pages() for fault in check(page))


# --- Checks of the pages -------------------------------------------------------------------------


def test_yaml_blocks_are_accepted_by_the_reader() -> None:
    assert not _faults(checks.check_yaml)


def test_python_blocks_compile_and_import_what_exists() -> None:
    assert not _faults(checks.check_python)


def test_json_blocks_parse_and_are_valid_data() -> None:
    assert not _faults(checks.check_json)


def test_commands_and_their_options_exist() -> None:
    assert not _faults(lambda page: checks.check_commands(page, _known()))


def test_recipe_fields_exist() -> None:
    assert not _faults(lambda page: checks.check_fields(page, _known()))


def test_links_and_anchors_exist() -> None:
    assert not _faults(lambda page: checks.check_links(page, _pages()))


def test_paths_and_the_names_in_them_exist() -> None:
    assert not _faults(checks.check_paths)


def test_every_recipe_field_has_a_description() -> None:
    fields = load_generator().recipe_fields().values()
    assert [field.path for field in fields if not field.description.strip()] == []


def test_every_command_has_a_help_text_and_an_example() -> None:
    commands = load_generator().commands()
    assert len(commands) > 20
    assert [command.name for command in commands if not command.example] == []
    assert [command.name for command in commands if not command.help] == []


def test_equations_have_one_number_each_and_docstrings_cite_existing_ones() -> None:
    numbers = equation_numbers((DOCS / "method.md").read_text(encoding="utf-8"))
    # An equation that was added later has the next number, in the section that it belongs to.
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    faults = []
    for file in sorted((ROOT / "pocl_ds").rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        faults += checks.check_citations(source, str(file.relative_to(ROOT)), numbers)
    assert faults == []


def test_quoted_messages_are_messages_of_the_program() -> None:
    page = Page("docs/troubleshooting.md", (DOCS / "troubleshooting.md").read_text("utf-8"))
    assert checks.check_messages(page, checks.program_messages()) == []


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 200


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "<math" in (tmp_path / "method" / "index.html").read_text(encoding="utf-8")
    assert "train.lr" in (tmp_path / "reference" / "recipe" / "index.html").read_text("utf-8")


# --- Every check can fail -----------------------------------------------------------------------

BAD_YAML = {
    "unknown field": "train:\n  learning_rate: 1\n",
    "value that is not allowed": "teacher:\n  mode: sometimes\n",
    "contradiction": "policy:\n  name: gkd\n",
    "unknown field of a profile": "partition: gpu\ncolor: red\n",
    "unknown arm of a study": (
        "name: s\nbase: quickstart\narms: {a: []}\nseeds: [1]\ncompare: [[a, b]]\n"
    ),
    "full recipe without data": "name: x\nstudent: {model: a}\n",
    "syntax": "train: [1\n",
    "no fields": "- 1\n",
    "missing plug-in": "plugins: [a_module_that_does_not_exist]\n",
}


@pytest.mark.parametrize("body", BAD_YAML.values(), ids=BAD_YAML.keys())
def test_a_bad_yaml_block_is_found(body: str) -> None:
    assert len(checks.check_yaml(Page("bad.md", f"text\n\n```yaml\n{body}```\n"))) == 1


def test_good_yaml_blocks_are_accepted() -> None:
    text = "```yaml\ntrain: {lr: 1.0e-4}\n```\n\n```yaml\npartition: gpu\n```\n"
    assert checks.check_yaml(Page("good.md", text)) == []


BAD_PYTHON = {
    "syntax": "def f(:\n",
    "unknown module": "from pocl_ds.nothing import x\n",
    "unknown name": "from pocl_ds.errors import NoSuchError\n",
}


@pytest.mark.parametrize("body", BAD_PYTHON.values(), ids=BAD_PYTHON.keys())
def test_a_bad_python_block_is_found(body: str) -> None:
    assert len(checks.check_python(Page("bad.md", f"```python\n{body}```\n"))) == 1


@pytest.mark.parametrize("body", ["print(1 + 1)  # 3\n", "raise KeyError\n"])
def test_an_executed_block_is_compared_with_its_comments(body: str) -> None:
    page = Page("bad.md", f"{EXECUTED}\n```python\n{body}```\n")
    assert len(checks.check_python(page)) == 1
    good = Page("good.md", f"{EXECUTED}\n```python\nprint(1 + 1)  # 2\n```\n")
    assert checks.check_python(good) == []


@pytest.mark.parametrize(
    ("language", "body"),
    [
        ("json", "{'a': 1}\n"),
        ("jsonl", '{"prompt": "a", "completion": }\n'),
        ("jsonl", '{"x": 1}\n'),
    ],
)
def test_a_bad_json_block_is_found(language: str, body: str) -> None:
    assert len(checks.check_json(Page("bad.md", f"```{language}\n{body}```\n"))) == 1


BAD_COMMANDS = {
    "unknown command": "```bash\npocl teach --run-dir runs/x\n```\n",
    "unknown command in prose": "Run `pocl teach` first.\n",
    "unknown option": "```bash\npocl run x --compare   # a comment\n```\n",
    "unknown override": "```bash\npocl run x train.clip=1\n```\n",
    "value of an override": "```bash\npocl run x teacher.mode=live\n```\n",
    "unknown nested command": "```bash\ncd x && pocl profile find\n```\n",
}


@pytest.mark.parametrize("text", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_bad_command_is_found(text: str) -> None:
    assert len(checks.check_commands(Page("bad.md", text), KNOWN)) == 1


def test_good_commands_are_accepted() -> None:
    text = (
        "```bash\npocl run x --dry-run train.lr=1 | less\npocl profile detect --partition a > b\n"
        "pocl run x loss.options.beta=1 # --compare\n```\n`pocl --help`, `pocl COMMAND`\n"
    )
    assert checks.check_commands(Page("good.md", text), KNOWN) == []


@pytest.mark.parametrize("span", ["train.clip", "train.clip: 1", "teacher.mode: live"])
def test_a_bad_field_is_found(span: str) -> None:
    assert len(checks.check_fields(Page("bad.md", f"Set `{span}`.\n"), KNOWN)) == 1


def test_good_fields_are_accepted() -> None:
    text = "`train.lr`, `teacher.mode: auto`, `train.checkpoint`, `loss.options.beta`, `train.md`\n"
    assert checks.check_fields(Page("good.md", text), KNOWN) == []


@pytest.mark.parametrize(
    "link", ["[a](missing.md)", "[a](other.md#nowhere)", "[a](#nowhere)", '<img src="none.svg">']
)
def test_a_bad_link_is_found(link: str) -> None:
    other = Page("docs/other.md", "# Other\n\n## A *section*, really {#named}\n")
    assert len(checks.check_links(Page("docs/bad.md", f"{link}\n"), [other])) == 1


def test_good_links_are_accepted() -> None:
    other = Page("docs/other.md", '# The other page\n\n## X {#named}\n<a id="raw"></a>\n\\tag{3}\n')
    text = "# Self\n" + "\n".join(
        f"[a]({link})"
        for link in (
            "other.md",
            "other.md#the-other-page",
            "other.md#named",
            "other.md#raw",
            "other.md#eq-3",
            "#self",
            "../README.md",
            "https://example.org/x#y",
        )
    )
    assert checks.check_links(Page("docs/good.md", text), [other]) == []


@pytest.mark.parametrize(
    "text", ["`pocl_ds/nothing.py`", "Add it to `NO_SUCH_NAME` in\n`pocl_ds/config/registry.py`."]
)
def test_a_bad_path_is_found(text: str) -> None:
    assert len(checks.check_paths(Page("bad.md", f"{text}\n"))) == 1


def test_good_paths_are_accepted() -> None:
    text = "`LOSSES` in `pocl_ds/config/registry.py`, `tests/unit`, `docs/reference/recipe.md`\n"
    assert checks.check_paths(Page("good.md", text)) == []


def test_a_citation_of_a_missing_equation_is_found() -> None:
    source = '"""A value (docs/method.md, eq. 1 and 28), wrapped (docs/method.md,\n    eq. 29)."""'
    assert len(checks.check_citations(source, "x.py", range(1, 28))) == 2


def test_a_quoted_message_that_does_not_exist_is_found() -> None:
    page = Page("bad.md", "### `it … does not exist`\n\n### `no such … message`\n")
    faults = checks.check_messages(page, ["data file … does not exist: check it …"])
    assert len(faults) == 1 or "no such" in faults[-1]


def test_a_command_without_an_example_is_found() -> None:
    generator = load_generator()
    undocumented = SimpleNamespace(help="Do it.", epilog=None, params=[], hidden=False)
    documented = SimpleNamespace(help="Do it.", epilog="Example: pocl b x", params=[], hidden=False)
    commands = list(
        generator.walk_commands(SimpleNamespace(commands={"a": undocumented, "b": documented}))
    )
    assert [command.example for command in commands] == ["", "pocl b x"]


def test_a_field_without_a_description_is_found() -> None:
    generator = load_generator()
    schema = {
        "properties": {
            "silent": {"type": "integer"},
            "nested": {"anyOf": [{"$ref": "#/$defs/Nested"}, {"type": "null"}]},
        }
    }
    definitions = {"Nested": {"properties": {"mode": {"enum": ["a", "b"], "description": "how"}}}}
    sections = list(generator.walk_schema(schema, definitions, generator.RecipeSection("", "")))
    fields = [field for section in sections for field in section.fields]
    assert [(field.path, field.description) for field in fields] == [
        ("silent", ""),
        ("nested.mode", "how"),
    ]
    assert sections[1].optional
    assert fields[1].type == "one of `a`, `b`"
