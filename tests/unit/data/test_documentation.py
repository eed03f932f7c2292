"""The source `documentation` is clean and deterministic, and imports nothing."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_ds.config import DocumentationConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.documentation import extract_documentation_samples, first_paragraph
from pocl_ds.errors import DataError


@pytest.fixture(scope="module")
def stdlib() -> list[Sample]:
    return list(extract_documentation_samples(DocumentationConfig(packages=("stdlib",))))


@pytest.mark.parametrize(
    ("docstring", "paragraph"),
    [
        ("Return the sum.\n\nMore.", "Return the sum."),
        ("Give\n    the   sum", "Give the sum."),
        ("dedent(text) -> str\n\nRemove whitespace.", "Remove whitespace."),
        ("range(stop)\nrange(start, stop[, step])\nReturn an object.", "Return an object."),
        (
            "Calls :func:`~torch.add` and :class:`a.B <x>` with ``y``.",
            "Calls torch.add and a.B with `y`.",
        ),
        ("See `the page <https://x.org/y>`_ and `Mock`_ first.", "See the page and Mock first."),
        (
            "Copies *old_node* with **great care** and *args, **kwargs.",
            "Copies old_node with great care and *args, **kwargs.",
        ),
        ("2 * 3 * 4 and `a*b` stay", "2 * 3 * 4 and `a*b` stay."),
        ("Make a variable :param curr: the counter :return: it", "Make a variable."),
        ("Add a writer callback..", "Add a writer callback."),
        ("An example::\n\n    x = 1", "An example."),
        (">>> f(1)\n2\n\nReturn it.", "Return it."),
        ("Parameters\n----------\nx : int\n    The x.", ""),
        ("Args:\n    x: the x", ""),
        ("=====\nTitle\n=====\n\nReturn the text.", "Return the text."),
        (".. deprecated:: 1.0\n\n:param x: the x", ""),
        ("", ""),
    ],
)
def test_first_paragraph(docstring: str, paragraph: str) -> None:
    assert first_paragraph(docstring) == paragraph


def test_extracts_a_known_function(stdlib: list[Sample]) -> None:
    (sample,) = [sample for sample in stdlib if "`textwrap.dedent`" in sample.instruction]
    assert sample.references == ("Remove any common leading whitespace from every line in `text`.",)
    assert sample.input == "" and len(sample.messages) == 2


def test_samples_are_many_clean_and_unique(stdlib: list[Sample]) -> None:
    answers = [sample.references[0] for sample in stdlib]
    assert len(stdlib) > 3000
    assert (
        len({sample.id for sample in stdlib})
        == len(set(answers))
        == len({s.instruction for s in stdlib})
        == len(stdlib)
    )
    for answer in answers:
        assert 4 <= len(answer.split()) <= 60 and answer.isascii() and "\n" not in answer
        assert ">>>" not in answer and ":func:" not in answer and ":param" not in answer
    assert 8 < sum(len(answer.split()) for answer in answers) / len(answers) < 20
    names = [sample.instruction.split("`")[1] for sample in stdlib]
    assert not [
        name
        for name in names
        if any(part.startswith("_") or part in ("tests", "idlelib") for part in name.split("."))
    ]


def test_questions_use_several_templates(stdlib: list[Sample]) -> None:
    templates = collections.Counter(
        sample.instruction.replace(sample.instruction.split("`")[1], "")
        for sample in stdlib
        if "`" in sample.instruction
    )
    assert len(templates) >= 12
    assert max(templates.values()) < len(stdlib) / 3


def test_extraction_is_deterministic() -> None:
    config = DocumentationConfig(packages=("email", "logging", "asyncio"))
    assert list(extract_documentation_samples(config)) == list(
        extract_documentation_samples(config)
    )


def test_answers_respect_the_word_limits() -> None:
    samples = list(
        extract_documentation_samples(
            DocumentationConfig(packages=("email", "asyncio"), min_words=10, max_words=12)
        )
    )
    assert {len(sample.references[0].split()) for sample in samples} == {10, 11, 12}


def test_packages_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "example_package"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(
        '"""A package for this test alone."""\nraise RuntimeError("was run")\n'
    )
    (package / "open.py").write_text(
        'def shown():\n    """Show what a caller may see."""\n\n'
        'def again():\n    """Show what a caller may see."""\n\n'
        'def _hidden():\n    """Hide what no caller may see."""\n\n'
        'def old():\n    """Deprecated since the version before last."""\n\n'
        'class Thing:\n    """A thing that holds other things."""\n\n'
        '    def use(self):\n        """Use the thing for its purpose."""\n'
    )
    (package / "_private.py").write_text('"""A module that is not public."""\n')
    (package / "tests" / "test_it.py").write_text(
        '"""A test module that is not documentation."""\n'
    )
    (package / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    samples = list(
        extract_documentation_samples(DocumentationConfig(packages=("example_package",)))
    )
    assert [(sample.instruction.split("`")[1], sample.references[0]) for sample in samples] == [
        ("example_package", "A package for this test alone."),
        ("example_package.open.shown", "Show what a caller may see."),
        ("example_package.open.Thing", "A thing that holds other things."),
        ("example_package.open.Thing.use", "Use the thing for its purpose."),
    ]
    assert "example_package" not in sys.modules


def test_error_names_a_package_that_is_not_installed() -> None:
    with pytest.raises(DataError, match="no_such_package.*not installed"):
        list(extract_documentation_samples(DocumentationConfig(packages=("no_such_package",))))


@pytest.mark.parametrize("name", ["email.mime", "sys", "_collections_abc", "test"])
def test_package_without_sources_is_an_error(name: str) -> None:
    """Subpackages, compiled modules and private modules would be left out silently."""
    with pytest.raises(
        DataError,
        match=rf"packages names '{name}', which has no public Python sources: name a "
        rf"whole",
    ):
        list(extract_documentation_samples(DocumentationConfig(packages=("email", name))))


def test_default_packages_are_read_quickly_without_importing_them() -> None:
    """In a separate process, where an import of torch would show."""
    script = (
        "import sys\nfrom pocl_ds.config import DocumentationConfig\nfrom "
        "pocl_ds.data.documentation import extract_documentation_samples\n"
        "samples = list(extract_documentation_samples(DocumentationConfig()))\n"
        "assert 'numpy' not in sys.modules and 'torch' not in sys.modules\nprint(len(samples))"
    )
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=Path(__file__).parents[3],
    )
    assert int(result.stdout) > 7000
    after = os.times()  # processor time of the child, which hardly depends on the load
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < 20
    )
