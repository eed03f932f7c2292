"""Where the model that a recipe names is on this machine. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from pocl_ds.errors import ModelError
from pocl_ds.resources import ROOT

PACKAGE_SCHEME = "package://"
ADAPTER_CONFIG = "adapter_config.json"


def local_path(source: str) -> Path:
    """The path that a recipe's `model` names, which may not exist. Raises ModelError if it is of
    a package that does not have it.
    """
    if source.startswith(PACKAGE_SCHEME):
        return find_in_package(source)
    return Path(os.path.expanduser(source))


def find_in_package(source: str) -> Path:
    """The file or folder that `package://PACKAGE/NAME` names, without importing the package.

    Raises ModelError if package or file do not exist.
    """
    package, _, name = source.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not name or ".." in Path(name).parts:
        raise ModelError(f"model {source!r} is not of the form package://PACKAGE/NAME")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {source}: the Python package {package} is not installed: pip install "
            f"{package.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    if package == "pocl_ds":
        folders.append(ROOT)  # launch/ of a checkout is beside the package
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    models = sorted(
        str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf")
    )
    raise ModelError(
        f"model {source}: package {package} has no file {name}; its models are: "
        f"{', '.join(models) or 'none'}"
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no complete model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter was trained on. Raises ModelError, also if a
    chain of adapters ends in itself.
    """
    name, revision = _named_base(folder)
    chain, base = {folder.resolve()}, local_path(name)
    while is_adapter(base):
        if base.resolve() in chain:
            raise ModelError(
                f"{folder / ADAPTER_CONFIG} names the base model {name}, an adapter whose base is "
                "again an adapter of this chain: set base_model_name_or_path to a complete model"
            )
        chain.add(base.resolve())
        base = local_path(_named_base(base)[0])
    return name, revision


def _named_base(folder: Path) -> tuple[str, str | None]:
    """What an adapter's configuration names as its base model. Raises ModelError."""
    path = folder / ADAPTER_CONFIG
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}): save the adapter again") from None
    name = tree.get("base_model_name_or_path") if isinstance(tree, dict) else None
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{path} does not name the adapter's base model: set base_model_name_or_path"
        )
    revision = tree.get("revision")
    return name, revision if isinstance(revision, str) else None
