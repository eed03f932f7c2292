"""Whether a container sees the files that its jobs read and write, checked before the queue."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pocl_ds.cluster.profile import ContainerConfig, Profile
from pocl_ds.cluster.recipe_inputs import data_sections, named_files
from pocl_ds.config import Recipe
from pocl_ds.data.source_files import local_files
from pocl_ds.errors import RecipeError
from pocl_ds.models.converted_models import models_folder
from pocl_ds.models.model_paths import base_of_adapter, is_adapter


def check_container(
    profile: Profile, recipe: Recipe, mounted: tuple[Path, ...], environment: Mapping[str, str]
) -> None:
    """Check that the image of a profile's container is here, if it is a file, and that the models,
    data, caches and the scratch folder are mounted under their own names.

    mounted: folders that are mounted in any case. environment: of this process, which jobs inherit.
    Raises RecipeError.
    """
    container = profile.container
    if container is None:
        return
    image = Path(container.image).expanduser()
    is_file = container.image.startswith(("/", ".", "~")) or image.suffix in (".sif", ".sqsh")
    if is_file and not image.exists():
        raise RecipeError(
            f"the profile's container.image: {container.image} does not exist here: correct the "
            "path, or build it (slurm/Dockerfile)"
        )
    folders = [*mounted, *_same_mounts(container)]
    if container.runtime != "pyxis":  # they mount it by default
        folders.append(Path.home())
    for name, path in _needed_paths(profile, recipe, environment):
        absolute = Path(os.path.abspath(path.expanduser()))
        if not any(absolute.is_relative_to(folder) for folder in folders):
            folder = absolute if absolute.is_dir() else absolute.parent
            raise RecipeError(
                f"{name}: {absolute} is not mounted in the container: add {folder}:{folder} to the "
                "profile's container.mounts"
            )


def _same_mounts(container: ContainerConfig) -> list[Path]:
    """The folders that have the same name inside and outside."""
    pairs = (mount.split(":")[:2] for mount in container.mounts)
    return [Path(source) for source, target in pairs if Path(source) == Path(target)]


def _needed_paths(
    profile: Profile, recipe: Recipe, environment: Mapping[str, str]
) -> Iterator[tuple[str, Path]]:
    """What the jobs read and write outside the run directory, and where."""
    variables = {**environment, **profile.environment}
    on_hub = False
    for source in recipe.local_models:
        for name, path in _model_paths(f"the model {source.label}", source.model):
            if path is None:
                on_hub = True
            else:
                yield name, path
    for field, section in data_sections(recipe).items():
        files = local_files(section.source)
        yield from ((f"recipe field {field}", path) for path in files)
        on_hub = on_hub or not files
    for field, name in named_files(recipe).items():
        yield f"recipe field {field}", Path(name)
    if on_hub:
        yield "HF_HOME", Path(variables.get("HF_HOME") or "~/.cache/huggingface")
    if profile.scratch:
        yield "the profile's scratch", Path(profile.scratch.partition("$")[0].rstrip("/") or "/")


def _model_paths(name: str, model: str) -> Iterator[tuple[str, Path | None]]:
    """What a job reads of one model, and of the base of an adapter. None: the cache of the Hub."""
    path = Path(os.path.expanduser(model))
    is_packaged = "://" in model  # its package is inside the container
    if is_packaged or path.suffix == ".gguf" or is_adapter(path):
        yield f"{name}, converted", models_folder()
    if not is_packaged:
        yield name, path if path.exists() else None
    if is_adapter(path):
        yield from _model_paths(f"the base of {name}", base_of_adapter(path)[0])
