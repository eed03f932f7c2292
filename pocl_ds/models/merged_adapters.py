"""Folders that hold a low-rank adapter alone, as peft and the trainers built on it save them.

Such an adapter is merged into its base model once, into a folder of the cache. From then on the
model is like any other: it is sharded, evaluated by vLLM and exported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from pocl_ds.errors import ModelError, ResourceError
from pocl_ds.models.converted_models import convert_once
from pocl_ds.models.lora import merge_adapter_folder
from pocl_ds.models.model_paths import ADAPTER_CONFIG
from pocl_ds.models.quiet import quiet
from pocl_ds.workflow.files import file_digest

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def merge_adapter(folder: Path, base: str, *, trust_remote_code: bool = False) -> Path:
    """The folder of the base model with the adapter merged, made on the first call.

    base: folder of the complete base model. The weights keep its data type, and the tokenizer is
    the adapter's own if it has one. Raises ModelError for an adapter that is damaged, of another
    model, or not a change of weights (as prompt tuning); ResourceError if peft is missing.
    """
    weights = next((folder / n for n in ADAPTER_WEIGHTS if (folder / n).is_file()), None)
    if weights is None:
        raise ModelError(
            f"adapter folder {folder} holds no weights ({' or '.join(ADAPTER_WEIGHTS)}): get the "
            "complete adapter"
        )
    if importlib.util.find_spec("peft") is None:
        raise ResourceError(
            f"{folder} is an adapter, which needs the package peft: pip install 'pocl_ds[lora]'"
        )
    digest = hashlib.sha256()
    for path in (folder / ADAPTER_CONFIG, weights):
        digest.update(file_digest(path)["sha256"].encode())
    # A base model may be large, and whoever changes one changes its files' times.
    for path in sorted(Path(base).glob("*")):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return convert_once(
        f"{folder.resolve().name}-{digest.hexdigest()[:16]}",
        lambda target: _merge(folder, base, target, trust_remote_code),
        action=f"merging the adapter {folder} with {base}",
    )


def _merge(folder: Path, base: str, target: Path, trust_remote_code: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(base, **arguments)
            model = merge_adapter_folder(model, folder)
            own_tokenizer = (folder / "tokenizer_config.json").is_file()
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if own_tokenizer else base, trust_remote_code=trust_remote_code
            )
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except ModelError:
        raise
    except Exception as error:  # two libraries raise many unrelated types
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):  # its text is the key alone
            reason = f"unknown or missing: {reason}"
        raise ModelError(
            f"adapter {folder} cannot be merged with {base} ({reason}): give the model that it was "
            "trained on as base_model_name_or_path, or merge it yourself"
        ) from error
