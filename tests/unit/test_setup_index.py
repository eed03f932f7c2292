"""launch/setup.sh on a machine that reaches only a package index: one of this test, over HTTP."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import wheel_files
from command_line import ROOT
from wheel_files import make_wheel

TORCH = "2.13.0"
# Builds the checkout, so that the index needs no setuptools.
BACKEND = """
    import sys
    sys.path.insert(0, ".")
    from wheel_files import make_wheel

    def build_editable(folder, settings=None, metadata=None):
        extras = ["Provides-Extra: cpu", "Requires-Dist: deepspeed==1.0; extra == 'cpu'"]
        headers = ["Requires-Dist: torch", "Requires-Dist: datasets", "Requires-Dist: transformers"]
        modules = {"pocl_ds/__init__.py": "", "pocl_ds/config.py": ""}
        return make_wheel(folder, "pocl_ds", "1.0", modules, [*headers, *extras])
"""
PROJECT = """
    [build-system]
    requires = []
    build-backend = "backend"
    backend-path = ["."]
    [project]
    name = "pocl_ds"
    version = "1.0"
    dependencies = ["torch", "transformers", "datasets"]
    [project.optional-dependencies]
    cpu = ["deepspeed==1.0"]
"""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Path]:
    """The folder of a package index, whose address is the environment's PIP_INDEX_URL."""
    folder = tmp_path / "simple"
    program = shutil.which("uv", path=Path(sys.executable).parent)
    real_uv = f"import os, sys; os.execv({program!r}, ['uv', *sys.argv[1:]])"
    packages = {"uv": (version("uv"), {"uv/__init__.py": "", "uv/__main__.py": real_uv})}
    packages["torch"] = (TORCH, {"torch.py": ""})
    for name in ("transformers", "datasets", "deepspeed"):
        packages[name] = ("1.0", {f"{name}.py": ""})
    for name, (number, modules) in packages.items():
        (folder / name).mkdir(parents=True)
        make_wheel(folder / name, name, number, modules, [])
    handler = functools.partial(_QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "address").write_text(f"http://127.0.0.1:{server.server_port}/simple")
        yield folder
        server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def run_setup(folder: Path, address: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run launch/setup.sh in a small checkout, which reaches nothing but the index."""
    (folder / "launch").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch" / "setup.sh", folder / "launch")
    shutil.copy(wheel_files.__file__, folder)
    (folder / "backend.py").write_text(textwrap.dedent(BACKEND))
    (folder / "pyproject.toml").write_text(textwrap.dedent(PROJECT))
    (folder / "constraints.txt").write_text(f"torch=={TORCH}\nuv=={version('uv')}\n")
    nowhere = "http://127.0.0.1:1"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))
    }
    return subprocess.run(
        ["bash", str(folder / "launch" / "setup.sh")],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **environment,
            "POCL_STACK": "cpu",
            "PYTHON": sys.executable,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": address or (folder / "address").read_text(),
            "PIP_RETRIES": "1",
            "UV_HTTP_RETRIES": "0",
            "UV_CACHE_DIR": str(folder / "cache"),
            "HTTPS_PROXY": nowhere,
            "HTTP_PROXY": nowhere,
            "NO_PROXY": "127.0.0.1",
        },
    )


@pytest.mark.weekly
def test_the_indexs_own_torch_replaces_a_missing_cpu_build(index: Path, tmp_path: Path) -> None:
    done = run_setup(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch 2.13.0, CPU build ... failed after" in done.stdout
    assert "no index that can be reached has the CPU build for this Python" in done.stdout
    assert "about 3 GB to download" in done.stdout and "setup: .venv takes " in done.stdout
    assert (tmp_path / ".venv" / ".pocl-base").exists()
    # A second call finds the finished set-up, and a CPU build that the index has is used.
    assert run_setup(tmp_path).stdout == ""
    shutil.rmtree(tmp_path / ".venv")
    make_wheel(index / "torch", "torch", f"{TORCH}+cpu", {"torch.py": ""}, [])
    done = run_setup(tmp_path)
    assert done.returncode == 0 and "the package index's own build" not in done.stdout
    (info,) = (tmp_path / ".venv").rglob("torch-*.dist-info")
    assert info.name == f"torch-{TORCH}+cpu.dist-info"


@pytest.mark.parametrize(
    ("missing", "step", "package"),
    [
        ("uv", "uv", f"uv=={version('uv')}"),
        pytest.param(
            *("torch", "torch 2.13.0, the package index's build", "torch"),
            marks=pytest.mark.weekly,
        ),
        pytest.param(
            *("deepspeed", "pinned packages (cpu), and pocl_ds itself", "deepspeed"),
            marks=pytest.mark.weekly,
        ),
    ],
)
def test_a_package_that_the_index_lacks_is_named(
    missing: str, step: str, package: str, index: Path, tmp_path: Path
) -> None:
    shutil.rmtree(index / missing)
    done = run_setup(tmp_path)
    assert done.returncode == 1, done.stdout
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith(
        f"launch/setup.sh: the step '{step}' failed: the package index has no suitable file of "
        f"{package} (Python 3."
    ), done.stderr
    assert "export PIP_FIND_LINKS=FOLDER" in sentence
    assert not (tmp_path / ".venv" / ".pocl-base").exists()


@pytest.mark.weekly
def test_an_older_version_in_the_index_is_not_enough(index: Path, tmp_path: Path) -> None:
    shutil.rmtree(index / "deepspeed")
    (index / "deepspeed").mkdir()
    make_wheel(index / "deepspeed", "deepspeed", "0.9", {"deepspeed.py": ""}, [])
    done = run_setup(tmp_path)
    assert done.returncode == 1
    assert "has no suitable file of deepspeed" in done.stderr.splitlines()[-1]


@pytest.mark.weekly
def test_an_index_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    done = run_setup(tmp_path, "http://me:pa55word@127.0.0.1:1/simple")
    assert done.returncode == 1
    sentence = done.stderr.splitlines()[-1]
    assert "cannot be reached: name a mirror that can" in sentence, done.stderr
    assert "pa55word" not in sentence
