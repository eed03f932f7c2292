"""The command `pocl` in a separate process, as users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pocl_ds.errors import Interrupted
from pocl_ds.workflow.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[1]
PLANTED = "PLANTEDplantedPLANTEDplanted"  # must not appear in any output or file
TWO_RANKS = ("bash", str(ROOT / "launch" / "train.sh"), "--ranks", "2", "--threads", "1")
SECRETS = {
    name: f"{PLANTED}{name}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "JUDGE_KEY")
}


def environment() -> dict[str, str]:
    """This process's environment with secrets, and without the variables of our launchers."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith("POCL_")
    } | SECRETS


def start(*words: str) -> subprocess.Popen[str]:
    """Start `pocl WORDS...`."""
    return subprocess.Popen(
        [sys.executable, "-m", "pocl_ds.cli.main", *words],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def pocl(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `pocl WORDS...` to its end, in a process that is forked from one with torch imported."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr")}
        request = {"words": words, "environment": environment()}
        request |= {name: str(path) for name, path in files.items()}
        try:
            code = _server().run("redirected_command", [json.dumps(request)], ["models"])
        except Interrupted as error:  # a signal ended it
            code = error.exit_code
        output = {name: path.read_text() for name, path in files.items()}
    process = subprocess.CompletedProcess(words, code, **output)
    assert PLANTED not in process.stdout + process.stderr
    assert not check or process.returncode == 0, process.stderr[-3000:]
    return process


_servers: dict[str, ForkServer] = {}  # at most one, by its environment


def _server() -> ForkServer:
    """The server of forked commands. Imports read variables, so another environment needs another
    one.
    """
    variables = {k: v for k, v in environment().items() if not k.startswith("PYTEST_")}
    key = json.dumps(variables, sort_keys=True)
    if key not in _servers:
        for server in _servers.values():
            server.close()
        _servers.clear()
        _servers[key] = ForkServer({"PYTHONPATH": str(ROOT / "tests")})
    return _servers[key]


def run_module(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> None:
    """Run a module of tests/ in its own process: training leaves process groups behind."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [*launcher, "--module"] if launcher else [sys.executable, "-m"]
    process = subprocess.run(
        [*command, name, *arguments],
        env={**environment(), "POCL_PYTHON": sys.executable, "PYTHONPATH": paths},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
