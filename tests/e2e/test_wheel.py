"""The wheel: everything that is shipped is in it, and works from another environment and another
working directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from command_line import ROOT, environment

from pocl_ds import __version__

CODE = ("pocl_ds", "launch", "ds_configs", "slurm")
OF_A_CHECKOUT = {
    f"launch/{name}.sh"
    for name in ("quickstart", "test", "setup", "bench_gpu", "study", "study_gpu")
}


def call(*words: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(word) for word in words], text=True, capture_output=True, timeout=120, **options
    )  # type: ignore
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders in its tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in CODE:
        shutil.copytree(
            ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        folder / "tree",
    )
    (found,) = folder.glob("*.whl")
    return found


class Installed:
    """The wheel in an environment of its own, which sees this one's packages but not its pocl_ds."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.venv, self.elsewhere = folder / "venv", folder / "else where"
        self.elsewhere.mkdir()
        call(sys.executable, "-m", "venv", "--without-pip", self.venv)
        self.python = self.venv / "bin" / "python"
        call(
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "install",
            "--no-deps",
            "--no-index",
            "--no-compile",
            wheel,
        )
        own = Path(
            call(
                self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"
            ).strip()
        )
        # Last, or pip would find a pocl_ds there. An editable install's own .pth file is not read
        # in a folder that one names.
        paths = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
        (own / "dependencies.pth").write_text("\n".join(paths))
        self.package = own / "pocl_ds"
        self.environment = environment() | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HOME": str(folder),
        }
        for name in ("PYTHONPATH", "TORCH_EXTENSIONS_DIR"):  # launch/test.sh sets the second
            self.environment.pop(name, None)

    def __call__(self, *words: str | Path, **more: str) -> str:
        return call(*words, cwd=self.elsewhere, env=self.environment | more)

    def pocl(self, *words: str) -> str:
        return self(self.venv / "bin" / "pocl", *words)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_everything_is_in_it(wheel: Path) -> None:
    shipped = {
        str(path.relative_to(ROOT))
        for name in CODE
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } - OF_A_CHECKOUT
    expected = {name if name.startswith("pocl_ds/") else f"pocl_ds/{name}" for name in shipped}
    found = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not re.match(r"pocl_ds-[\d.]+\.dist-info/", name)
    }
    assert found == expected
    assert wheel.name == f"pocl_ds-{__version__}-py3-none-any.whl"


def test_commands_of_an_installed_wheel(installed: Installed) -> None:
    assert installed.pocl("--version") == f"pocl {__version__}\n"
    assert "train      would run" in installed.pocl("run", "quickstart", "--dry-run")
    assert "pocl-gkd-seed42" in installed.pocl("study", "paper", "--dry-run")
    scripts = installed.pocl("submit", "quickstart", "--profile", "gpu", "--dry-run")
    assert "#SBATCH --gpus-per-node=1" in scripts and str(installed.elsewhere) in scripts
    assert not list(installed.elsewhere.iterdir())


def test_ranks_of_an_installed_wheel(installed: Installed, tmp_path: Path) -> None:
    """Its launcher starts them, from a folder whose files they must not take; the cache is not in
    site-packages.
    """
    (tmp_path / "which.py").write_text(
        "import os, sys, pocl_ds.config\nprint(pocl_ds.__file__, "
        "os.environ['TORCH_EXTENSIONS_DIR'], *sys.path, sep='\\n')\n"
    )
    (installed.elsewhere / "pocl_ds.py").write_text(
        "raise SystemExit('taken from the working directory')\n"
    )
    try:
        launcher = installed.package / "launch" / "train.sh"
        said = installed(
            "bash",
            launcher,
            "--module",
            "which",
            "x",
            PYTHONPATH=str(tmp_path),
            POCL_PYTHON=str(installed.python),
        )
    finally:
        (installed.elsewhere / "pocl_ds.py").unlink()
    package, cache, *paths = said.splitlines()
    assert Path(package) == installed.package / "__init__.py"
    assert cache == f"{installed.environment['XDG_CACHE_HOME']}/pocl_ds/torch_extensions"
    assert not [
        path
        for path in paths
        if Path(path) == installed.package or installed.package in Path(path).parents
    ]


def test_code_that_jobs_run_is_laid_out_as_a_checkout(installed: Installed, tmp_path: Path) -> None:
    copy = "import sys, pathlib; from pocl_ds.resources import copy_code; copy_code(pathlib.Path(sys.argv[1]))"
    installed(installed.python, "-c", copy, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CODE)
    assert not {path.name for path in (tmp_path / "pocl_ds").iterdir()} & {*CODE}
    which = "from pocl_ds import resources; print(resources.ROOT)"
    assert installed(
        installed.python, "-c", which, PYTHONPATH=str(tmp_path)
    ).strip() == os.path.realpath(tmp_path)
    said = installed(
        installed.python,
        tmp_path / "launch" / "pocl.py",
        "pocl_ds.cli.main",
        "run",
        "quickstart",
        "--dry-run",
    )
    assert "would run" in said
