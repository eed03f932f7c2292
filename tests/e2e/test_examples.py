"""The programs in examples/ and the notebook in docs/ run unchanged and use only public names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import nbformat
import pytest
from command_line import ROOT
from nbclient import NotebookClient

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "docs" / "notebooks" / "distill.ipynb"
MAX_LINES = 150


def run_example(name: str, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def private_imports(source: str) -> list[str]:
    """Names that a program imports from pocl_ds although no `__all__` lists them."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("pocl_ds.")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pocl_ds":
            module = importlib.import_module(str(node.module))
            public = {*getattr(module, "__all__", ()), "plugins"}
            names += [f"{node.module}.{a.name}" for a in node.names if a.name not in public]
    return names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_imports_public_names(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    assert private_imports(source) == []


def test_a_private_import_is_found() -> None:
    source = "from pocl_ds.curriculum import Sampler, SIZE\nimport pocl_ds.data.records"
    assert private_imports(source) == ["pocl_ds.curriculum.SIZE", "pocl_ds.data.records"]


def test_custom_divergence() -> None:
    losses = [
        float(value) for value in re.findall(r"loss ([\d.]+)", run_example("custom_divergence.py"))
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 10


def test_custom_schedule() -> None:
    output = run_example("custom_schedule.py")
    assert "same batches in both plans: True" in output
    assert re.search(r"^ +3 +36 +8 +1\.500 +1\.500$", output, re.MULTILINE)


def test_math_answers() -> None:
    lines = run_example("math_answers.py").splitlines()
    assert [line.split()[1] for line in lines] == ["right", "right", "wrong", "wrong"]
    values = [float(line.split()[0]) for line in lines]
    assert values == sorted(values) and values[1] < 1 <= values[2]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"first \boxed{3}, then \boxed{\frac{22}{7}}", "22/7"),
        (r"\boxed{x = {1,234.50}}", "2469/2"),
        ("7 of 8\n#### -12", "-12"),
        ("the answer is 3 / 4.", "3/4"),
        ("0.25 or .5", "1/2"),
        ("nothing", None),
        ("1/0", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    path = ROOT / "examples" / "math_answers.py"
    specification = importlib.util.spec_from_file_location("math_answers", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.final_number(text) == (None if number is None else Fraction(number))


def test_trl_trainer() -> None:
    pytest.importorskip("trl")
    steps = re.findall(
        r"stage (\d)  temperature (\S+)  SFT ratio (\S+)", run_example("trl_trainer.py")
    )
    assert steps == [("1", "1.0", "0.3")] * 2 + [("2", "2.0", "0.0")] * 4


def test_lightning_trainer() -> None:
    assert "6 of 6 optimizer steps" in run_example("lightning_trainer.py")


@pytest.mark.weekly
def test_distill_minimal() -> None:
    """With two epochs per stage the student comes closer to its teacher."""
    output = run_example("distill_minimal.py")
    match = re.search(r"KL to the teacher .*: ([\d.]+) -> ([\d.]+) nats", output)
    assert match and float(match[2]) < float(match[1]) / 1.5


@pytest.mark.weekly
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs; the last one shows the results of teacher and student."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    output_text = "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        for output in notebook.cells[-1].outputs
    )
    assert "student" in output_text and "teacher" in output_text
