"""The rules on imports: which subpackage may import from which, and which libraries are too heavy
to be imported early.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pocl_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

# Subpackages by tier. A file imports from its own subpackage and from lower tiers, and from another
# subpackage of the same tier only if SAME_TIER allows it. A module that is listed here may have
# another tier than its subpackage.
TIERS = (
    ("errors", "resources"),
    (
        *("workflow.files", "workflow.locks", "workflow.manifest", "workflow.run_dir"),
        *("workflow.local_copy", "compat", "config", "runtime"),
    ),
    ("data", "models", "metrics", "curriculum"),
    ("losses", "engines"),
    ("generation", "teachers", "rollouts"),
    ("difficulty", "scoring", "training", "evaluation", "report"),
    ("workflow", "plugins"),
    ("cluster", "integrations"),
    ("api", "bench", "study"),
    ("__init__",),
    ("cli",),
)
TIER = {
    subpackage: number for number, subpackages in enumerate(TIERS) for subpackage in subpackages
}
SAME_TIER = {  # (subpackage, subpackage of the same tier that it may import from)
    ("config", "runtime"),
    ("runtime", "compat"),
    ("runtime", "workflow.files"),
    ("runtime", "workflow.manifest"),
    ("workflow.manifest", "workflow.files"),
    ("workflow.locks", "runtime"),
    ("workflow.locks", "workflow.files"),
    ("workflow.local_copy", "runtime"),
    ("workflow.local_copy", "workflow.files"),
    ("workflow.local_copy", "workflow.locks"),
    ("workflow.run_dir", "workflow.files"),
    ("workflow.run_dir", "workflow.manifest"),
    ("rollouts", "generation"),
    ("teachers", "generation"),
}
ONE_FILE = {
    "deepspeed": ("engines/deepspeed_engine.py", "compat/deepspeed_private.py"),
    "vllm": ("generation/vllm_engine.py", "compat/vllm_private.py"),
    "peft": ("models/lora.py",),
    "lm_eval": ("evaluation/harness.py",),
}
HEAVY = ("torch", "transformers", "deepspeed", "vllm", "datasets", "peft")


def subpackage_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    module = ".".join(relative.with_suffix("").parts)
    return module if module in TIER else module.partition(".")[0]


def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names that a syntax tree imports, with the names that it takes from a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def violations(path: Path, text: str) -> list[str]:
    """The rules that a file at `path` with this text breaks."""
    subpackage, broken = subpackage_of(path), []
    for name in sorted(imported_names(ast.parse(text))):
        package, _, module = name.partition(".")
        if package in ONE_FILE and str(path.relative_to(PACKAGE)) not in ONE_FILE[package]:
            broken.append(f"imports {name}, which only {' and '.join(ONE_FILE[package])} may")
        # The longest entry of TIERS that the name begins with: `workflow.files`, not `workflow`.
        parts = module.split(".")
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        other = next((prefix for prefix in prefixes if prefix in TIER), parts[0])
        if package != "pocl_ds" or not other or other == subpackage or other.startswith("__"):
            continue
        if other not in TIER:
            broken.append(f"imports {name}, which is in no tier")
        elif TIER[other] > TIER[subpackage] or (
            TIER[other] == TIER[subpackage] and (subpackage, other) not in SAME_TIER
        ):
            broken.append(f"{subpackage} imports {name}, which is not in a lower tier")
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_tiers_only(path: Path) -> None:
    assert subpackage_of(path) in TIER, f"{path} is in a subpackage that TIERS does not list"
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data/x.py", "from pocl_ds.training.trainer import train"),
        ("difficulty/x.py", "def f():\n    from pocl_ds.evaluation import answers"),
        ("data/x.py", "from pocl_ds import models"),
        ("data/x.py", "from pocl_ds.workflow import pipeline"),
        ("training/trainer.py", "import deepspeed"),
        ("difficulty/score.py", "from vllm import LLM"),
        ("config/recipe.py", "from pocl_ds.data import records"),
        ("data/x.py", "from pocl_ds.unlisted import x"),
    ],
)
def test_violations_are_found(file: str, text: str) -> None:
    assert violations(PACKAGE / file, text)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data/x.py", "from pocl_ds.workflow.files import atomic_write"),
        ("data/x.py", "from pocl_ds.workflow import run_dir"),
        ("training/x.py", "from pocl_ds.data.records import Sample"),
        ("cli/x.py", "from pocl_ds import plugins"),
    ],
)
def test_imports_from_lower_tiers_are_allowed(file: str, text: str) -> None:
    assert violations(PACKAGE / file, text) == []


LIGHT = (
    "",
    ".config",
    ".config.recipe_file",
    ".config.ds_config",
    ".cli.main",
    ".errors",
    ".resources",
    ".runtime.logs",
    ".runtime.metrics",
    ".runtime.process_exit",
    ".runtime.progress",
    ".workflow.pipeline",
    ".workflow.run_dir",
    ".workflow.steps",
    ".curriculum.plan",
    ".difficulty.rank",
    ".study.table",
    ".cluster.status",
    ".cluster.watch",
    ".cluster.submit",
    ".report.build",
)


def test_light_modules_load_no_heavy_library() -> None:
    """In one process, which stops at the first module that loads one."""
    code = (
        "import importlib, sys\n"
        f"for module in {LIGHT!r}:\n"
        "    importlib.import_module('pocl_ds' + module)\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    if loaded: sys.exit(f'pocl_ds{module} loads {loaded}')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
