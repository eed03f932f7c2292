"""The help of `pocl`: its panels, an example in each command, completion, and what it imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from refusals import restored_signals

from pocl_ds.cli.main import app, main
from pocl_ds.workflow.steps import STEP_NAMES

HEAVY = ("torch", "transformers", "vllm", "deepspeed", "datasets", "numpy", "pydantic")


def commands(group: Any, prefix: str = "pocl") -> Iterator[tuple[str, Any]]:
    """Full name and command of each command below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


COMMANDS = dict(commands(typer.main.get_command(app)))


def pocl(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pocl WORDS...` in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "pocl_ds.cli.main", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_panels(capsys: pytest.CaptureFixture[str]) -> None:
    with restored_signals():
        assert main(["--help"]) == 0
    output = capsys.readouterr().out
    panels = re.findall(r"─ ([A-Z][a-z ]+) ─", output)
    assert panels == ["Options", "Pipeline", "Inspect and compare", "Cluster", "Tools"]
    names = re.findall(r"^│ ([a-z][a-z-]+) ", output, re.MULTILINE)
    assert len(names) == len(set(names)) and {*STEP_NAMES, "run", "profile"} <= set(names)
    # A run has its steps in order.
    assert [name for name in names if name in STEP_NAMES] == list(STEP_NAMES)


def test_help_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with restored_signals():
        assert main([]) == 0 and main(["--version"]) == 0
    output = capsys.readouterr().out
    assert "Usage: pocl" in output and re.search(r"^pocl [\d.]+$", output, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_sentence_and_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    assert re.match(r"[A-Z][a-z]+,? .*\.$", command.help.splitlines()[0])
    assert command.epilog.startswith(f"Example: {name}")
    with restored_signals():
        assert main([*name.split()[1:], "--help"]) == 0
    assert f"Usage: {name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_has_a_help_sentence(name: str) -> None:
    for parameter in COMMANDS[name].params:
        text = getattr(parameter, "help", None) or ""
        assert text.endswith("."), (parameter.name, text)


def test_a_run_is_addressed_by_run_dir_everywhere() -> None:
    for name, command in COMMANDS.items():
        positional = [p for p in command.params if p.param_type_name == "argument"]
        assert not [p.name for p in positional if "run" in p.name], name


def test_help_of_run_names_the_field_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with restored_signals():
        assert main(["run", "--help"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "docs/reference/recipe.md" in output and "`pocl show RECIPE`" in output


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom pocl_ds.cli.main import main\n"
        "main(['--help'])\n"
        f"print('HEAVY', sorted({set(HEAVY)} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.endswith("HEAVY []\n"), result.stdout[-200:] + result.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pocl cache", ["cache-teacher"]),
        ("pocl run quick", ["quickstart"]),
        ("pocl run quickstart train.checkpoint.k", ["keep_best=", "keep_last="]),
        ("pocl run quickstart --until pl", ["plan"]),
        ("pocl study pap", ["paper"]),
        ("pocl bench ro", ["rollout", "rouge"]),
        ("pocl submit quickstart --profile gp", ["gpu"]),
    ],
)
def test_shell_completion(line: str, expected: list[str]) -> None:
    words = line.split()
    result = pocl(_POCL_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert result.returncode == 0, result.stderr
    completions = [text.rpartition("train.checkpoint.")[2] for text in result.stdout.split()]
    assert set(expected) <= set(completions) and len(completions) < len(expected) + 2


def test_completion_scripts() -> None:
    result = pocl("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert result.returncode in (0, 2)
    script = pocl(_POCL_COMPLETE="source_bash").stdout
    assert "_POCL_COMPLETE=complete_bash" in script
