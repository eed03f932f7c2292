"""Paths of files that are shipped with the code, and the folder for caches.

A checkout, and the copy of the code that jobs run, have `launch/`, `ds_configs/` and `slurm/`
next to the package; a wheel has them inside it, because folders with such names do not belong in
site-packages.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE if (PACKAGE / "launch").is_dir() else PACKAGE.parent
FOLDERS = ("launch", "ds_configs", "slurm")

DS_CONFIGS = ROOT / "ds_configs"
RECIPES = ROOT / "launch" / "recipes"
STUDIES = ROOT / "launch" / "studies"
LAUNCHER = ROOT / "launch" / "train.sh"
PROFILES = ROOT / "slurm" / "profiles"
JOB_TEMPLATE = ROOT / "slurm" / "job.sbatch.j2"


def shipped_names(folder: Path) -> list[str]:
    """Names of the YAML files in a shipped folder and below it, such as `methods/adakd`."""
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )


def module_command(module: str) -> list[str]:
    """The command that runs a module of this tree in a separate process. `python -m` would search
    the working directory first.
    """
    return [sys.executable, str(ROOT / "launch" / "pocl.py"), module]


def cache_folder() -> Path:
    """The folder for caches: `.cache` of a checkout, or the user's cache folder for an installed
    package.
    """
    if (ROOT / "pyproject.toml").is_file():
        return ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pocl_ds"


def copy_code(target: Path) -> None:
    """Copy the package and its shipped files into a folder with the layout of a checkout."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)

    def ignore_shipped(folder: str, names: list[str]) -> set[str]:
        return ignore(folder, names) | ({*FOLDERS} if Path(folder) == PACKAGE else set())

    shutil.copytree(PACKAGE, target / PACKAGE.name, ignore=ignore_shipped)
