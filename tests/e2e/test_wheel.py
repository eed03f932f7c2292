"""The wheel contains every shipped file and works from another environment and another working
directory.
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

FOLDERS = ("pocl_ds", "launch", "ds_configs", "slurm")
# Scripts that make sense only in a checkout.
NOT_IN_THE_WHEEL = {
    f"launch/{name}.sh"
    for name in ("quickstart", "test", "setup", "gpu", "study", "study_gpu", "study_tasks")
} | {"slurm/Dockerfile"}


def run_command(*words: str | Path, **options: object) -> str:
    process = subprocess.run(
        [str(word) for word in words], text=True, capture_output=True, timeout=120, **options
    )  # type: ignore
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, because a build writes folders into its source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    run_command(
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
    (wheel,) = folder.glob("*.whl")
    return wheel


class WheelEnvironment:
    """A virtual environment with the wheel. It uses the packages of this environment, but not its
    pocl_ds.
    """

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.venv, self.working_dir = folder / "venv", folder / "working dir"
        self.working_dir.mkdir()
        run_command(sys.executable, "-m", "venv", "--without-pip", self.venv)
        self.python = self.venv / "bin" / "python"
        run_command(
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
        site_packages = Path(
            run_command(
                self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"
            ).strip()
        )
        # Written after the installation, in which pip would otherwise find a pocl_ds. In folders
        # that this file names Python does not read the .pth file of an editable install.
        paths = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
        (site_packages / "dependencies.pth").write_text("\n".join(paths))
        self.package = site_packages / "pocl_ds"
        self.environment = environment() | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HOME": str(folder),
        }
        for name in ("PYTHONPATH", "TORCH_EXTENSIONS_DIR"):  # launch/test.sh sets the latter
            self.environment.pop(name, None)

    def __call__(self, *words: str | Path, **more: str) -> str:
        return run_command(*words, cwd=self.working_dir, env=self.environment | more)

    def pocl(self, *words: str) -> str:
        return self(self.venv / "bin" / "pocl", *words)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> WheelEnvironment:
    return WheelEnvironment(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_contains_every_shipped_file(wheel: Path) -> None:
    shipped = {
        str(path.relative_to(ROOT))
        for name in FOLDERS
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } - NOT_IN_THE_WHEEL
    expected = {name if name.startswith("pocl_ds/") else f"pocl_ds/{name}" for name in shipped}
    packed = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not re.match(r"pocl_ds-[\d.]+\.dist-info/", name)
    }
    assert packed == expected
    assert wheel.name == f"pocl_ds-{__version__}-py3-none-any.whl"


def test_commands_of_an_installed_wheel(installed: WheelEnvironment) -> None:
    assert installed.pocl("--version") == f"pocl {__version__}\n"
    assert re.search(r"\ntrain +would run", installed.pocl("run", "quickstart", "--dry-run"))
    assert "pocl-opt-2.7b-to-350m-gkd-seed42" in installed.pocl("study", "paper", "--dry-run")
    scripts = installed.pocl("submit", "quickstart", "--profile", "gpu", "--dry-run")
    assert "#SBATCH --gpus-per-node=1" in scripts and str(installed.working_dir) in scripts
    assert not list(installed.working_dir.iterdir())


def test_ranks_of_an_installed_wheel(installed: WheelEnvironment, tmp_path: Path) -> None:
    """The launcher of the wheel starts ranks that import nothing from the working directory; the
    cache is outside site-packages.
    """
    (tmp_path / "print_paths.py").write_text(
        "import os, sys, pocl_ds.config\nprint(pocl_ds.__file__, "
        "os.environ['TORCH_EXTENSIONS_DIR'], *sys.path, sep='\\n')\n"
    )
    (installed.working_dir / "pocl_ds.py").write_text(
        "raise SystemExit('imported from the working directory')\n"
    )
    try:
        launcher = installed.package / "launch" / "train.sh"
        output = installed(
            "bash",
            launcher,
            "--module",
            "print_paths",
            "x",
            PYTHONPATH=str(tmp_path),
            POCL_PYTHON=str(installed.python),
        )
    finally:
        (installed.working_dir / "pocl_ds.py").unlink()
    package, cache, *paths = output.splitlines()
    assert Path(package) == installed.package / "__init__.py"
    assert cache == f"{installed.environment['XDG_CACHE_HOME']}/pocl_ds/torch_extensions"
    assert not [
        path
        for path in paths
        if Path(path) == installed.package or installed.package in Path(path).parents
    ]


def test_copied_code_has_the_layout_of_a_checkout(
    installed: WheelEnvironment, tmp_path: Path
) -> None:
    copy_script = (
        "import sys, pathlib; from pocl_ds.resources import copy_code; "
        "copy_code(pathlib.Path(sys.argv[1]))"
    )
    installed(installed.python, "-c", copy_script, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FOLDERS)
    assert not {path.name for path in (tmp_path / "pocl_ds").iterdir()} & {*FOLDERS}
    print_root = "from pocl_ds import resources; print(resources.ROOT)"
    assert installed(
        installed.python, "-c", print_root, PYTHONPATH=str(tmp_path)
    ).strip() == os.path.realpath(tmp_path)
    output = installed(
        installed.python,
        tmp_path / "launch" / "pocl.py",
        "pocl_ds.cli.main",
        "run",
        "quickstart",
        "--dry-run",
    )
    assert "would run" in output
