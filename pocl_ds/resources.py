"""Where what is shipped beside the code lies, in a checkout as in an installed wheel, and where
caches may be written.

A checkout, and the copy of the code that jobs run, have `launch/`, `ds_configs/` and `slurm/`
beside the package. A wheel has them inside it, since site-packages is no place for folders of such
names.
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


def module_command(module: str) -> list[str]:
    """What runs a module of this very tree in a process of its own: `python -m` looks into the
    working directory first.
    """
    return [sys.executable, str(ROOT / "launch" / "pocl.py"), module]


def cache_folder() -> Path:
    """Where caches go: `.cache` of a checkout, else the user's own, since site-packages belongs to
    whoever installed it.
    """
    if (ROOT / "pyproject.toml").is_file():
        return ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pocl_ds"


def copy_code(target: Path) -> None:
    """Copy the package and what is shipped with it into a folder, laid out as in a checkout."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)

    def outside(folder: str, names: list[str]) -> set[str]:
        return unwanted(folder, names) | ({*FOLDERS} if Path(folder) == PACKAGE else set())

    shutil.copytree(PACKAGE, target / PACKAGE.name, ignore=outside)
