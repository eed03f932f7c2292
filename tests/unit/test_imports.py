"""The house rules on imports: who may enter which room, and what is too heavy to be imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pocl_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms by tier: a file imports from lower tiers, from its own room, and within a tier only where
# `SIDEWAYS` allows it. A module that is named here with its room has a tier of its own.
TIERS = (
    ("__init__",),
    ("errors", "resources"),
    ("compat",),
    (
        "config",
        "workflow.files",
        "workflow.manifest",
        "workflow.run_dir",
        "runtime",
    ),
    ("data", "models", "metrics", "curriculum"),
    ("losses", "engines"),
    ("generation", "teachers", "rollouts"),
    ("difficulty", "training", "evaluation", "report"),
    ("workflow", "plugins"),
    ("cluster",),
    ("bench", "study"),
    ("cli",),
)
TIER = {room: number for number, rooms in enumerate(TIERS) for room in rooms}
SIDEWAYS = {  # (room, room it may enter in its own tier)
    ("config", "runtime"),
    ("runtime", "workflow.files"),
    ("runtime", "workflow.manifest"),
    ("workflow.manifest", "workflow.files"),
    ("workflow.run_dir", "workflow.files"),
    ("rollouts", "generation"),
    ("teachers", "generation"),
}
ONE_FILE = {
    "deepspeed": "engines/deepspeed_engine.py",
    "vllm": "generation/vllm_backend.py",
    "peft": "models/lora.py",
}
HEAVY = ("torch", "transformers", "deepspeed", "vllm", "datasets", "peft")


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    module = ".".join(relative.with_suffix("").parts)
    return module if module in TIER else module.partition(".")[0]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a syntax tree imports; `from pocl_ds import data` gives pocl_ds.data."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names.update(
                [f"pocl_ds.{alias.name}" for alias in node.names]
                if module == "pocl_ds"
                else [module]
            )
    return names


def violations(path: Path, text: str) -> list[str]:
    """What a file at `path` with this text breaks."""
    room, found = room_of(path), []
    for name in sorted(imported(ast.parse(text))):
        package, _, rest = name.partition(".")
        # One file may import a library, beside the one that uses its private names.
        if package in ONE_FILE and str(path.relative_to(PACKAGE)) not in (
            ONE_FILE[package],
            f"compat/{package}_private.py",
        ):
            found.append(f"imports {package}, which only {ONE_FILE[package]} does")
        other = rest if rest in TIER else rest.partition(".")[0]
        if package != "pocl_ds" or not other or other == room or other.startswith("__"):
            continue
        if other not in TIER:
            found.append(f"imports {name}, a room without a tier")
        elif TIER[other] > TIER[room] or (
            TIER[other] == TIER[room] and (room, other) not in SIDEWAYS
        ):
            found.append(f"{room} imports {name}, which is not a room before it")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_enters_only_rooms_before_it(path: Path) -> None:
    assert room_of(path) in TIER, f"{path} is in a room that TIERS does not list"
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data/x.py", "from pocl_ds.training.trainer import train"),
        ("difficulty/x.py", "def f():\n    from pocl_ds.evaluate import stage"),
        ("data/x.py", "from pocl_ds import models"),
        ("distill/trainer.py", "import deepspeed"),
        ("difficulty/score.py", "from vllm import LLM"),
        ("config.py", "from pocl_ds.data import samples"),
    ],
)
def test_the_rule_catches(file: str, text: str) -> None:
    assert violations(PACKAGE / file, text)


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "config.recipe_file",
        "cli.main",
        "errors",
        "workflow.run_dir",
        "resources",
        "config.ds_config",
        "curriculum.plan",
        "difficulty.rank",
        "workflow.pipeline",
        "workflow.steps",
        "study.table",
        "cluster.status",
        "cluster.watch",
        "cluster.submit",
        "report.build",
    ],
)
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, pocl_ds.{module}\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loads {loaded}' if loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
